package client

import (
	"bytes"
	"context"
	"errors"
	"testing"

	"mortar/internal/fsop"
)

// TestPartial: of a write that does not fit, as much as fits is written: all of
// it, to the block, and what a short reply says is what was written.
func TestPartial(t *testing.T) {
	data := make([]byte, 1<<20)
	for i := range data {
		data[i] = byte(i / 4096)
	}
	for _, tt := range []struct {
		name       string
		off, n     int
		blocks     int // that the file may have
		window     fsop.Window
		want       int // bytes in the file afterwards
		wantErr    bool
		wantShort  bool
		maxQueries int
	}{
		{"it fits", 0, 1 << 20, 256, 0, 1 << 20, false, false, 1},
		{"none fits", 0, 1 << 20, 0, 0, 0, true, false, 10},
		{"a block does not", 0, 4096, 0, 0, 0, true, false, 1},
		{"half fits", 0, 1 << 20, 128, 0, 1 << 19, false, true, 2},
		{"the rest of a block", 100, 5000, 1, 0, 4096, false, true, 3},
		{"within a block that is there", 100, 1000, 1, 0, 1100, false, false, 1},
		{"the largest part", 0, 1 << 20, 100, 0, 64 * 4096, false, true, 3},
		{"acknowledged", 0, 1 << 20, 100, fsop.WindowHeld, 100 * 4096, true, false, 30},
		{"acknowledged, off the blocks", 1000, 1 << 20, 77, fsop.WindowHeld | fsop.WindowDone, 77 * 4096, true, false, 40},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var file []byte
			queries, done := 0, false
			p := &partial{fsop.HandlerFunc(func(_ context.Context, op fsop.Op) (*fsop.Reply, error) {
				w := op.(*fsop.Write)
				queries++
				end := int(w.Off) + len(w.Data)
				if (end+4095)/4096 > tt.blocks {
					return nil, fsop.EDQUOT
				}
				if end > len(file) {
					file = append(file, make([]byte, end-len(file))...)
				}
				copy(file[w.Off:], w.Data)
				done = done || w.Window&fsop.WindowDone != 0
				return &fsop.Reply{Off: w.Off}, nil
			})}
			reply, err := p.Do(t.Context(), &fsop.Write{Off: uint64(tt.off), Data: data[:tt.n], Window: tt.window})
			if errors.Is(err, fsop.EDQUOT) != tt.wantErr || err != nil && !tt.wantErr {
				t.Errorf("error %v", err)
			}
			if len(file) != tt.want || len(file) > tt.off && !bytes.Equal(file[tt.off:], data[:len(file)-tt.off]) {
				t.Errorf("%d bytes in the file, want %d", len(file), tt.want)
			}
			if err == nil && (reply.Short != 0) != tt.wantShort || err == nil && tt.wantShort && int(reply.Short) != tt.want-tt.off {
				t.Errorf("the reply says %d", reply.Short)
			}
			if queries > tt.maxQueries || done {
				t.Errorf("%d requests; window given up: %v", queries, done)
			}
		})
	}
}
