package mount

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"mortar/internal/fsop"
	"mortar/internal/fsop/memfs"
	"mortar/internal/pacer"
	"mortar/internal/proto"
)

// TestReadOvertaken has a change overtake the answer to the question that the
// kernel asks before a read. The read may or may not see that change, or see it as far
// as the file reached before; it must see all of those before, and nothing that
// was never there.
func TestReadOvertaken(t *testing.T) {
	for _, kind := range kinds {
		for _, tc := range []struct {
			name          string
			before, after string // contents when the kernel learnt the size, and before the read
			overtakes     func(t *testing.T, o fsop.Handler, ino fsop.Ino)
			want          []string
		}{
			{"longer", "1", "22", func(t *testing.T, o fsop.Handler, ino fsop.Ino) { rewrite(t, o, ino, "333") }, []string{"22", "33", "333"}},
			{"longer by pages", "1", strings.Repeat("2", 9000), func(t *testing.T, o fsop.Handler, ino fsop.Ino) { rewrite(t, o, ino, strings.Repeat("3", 9500)) },
				[]string{strings.Repeat("2", 9000), strings.Repeat("3", 9000), strings.Repeat("3", 9500)}},
			{"shorter", "55555", "44", func(t *testing.T, o fsop.Handler, ino fsop.Ino) { rewrite(t, o, ino, "33") }, []string{"44", "33"}},
			{"emptied", "55555", "", func(t *testing.T, o fsop.Handler, ino fsop.Ino) { chmodVia(t, o, ino) }, []string{""}},
			{"only touched", "55555", "666666", func(t *testing.T, o fsop.Handler, ino fsop.Ino) { chmodVia(t, o, ino) }, []string{"666666"}},
		} {
			t.Run(kind.name+"/"+tc.name, func(t *testing.T) {
				mem := memfs.New()
				g := &gate{}
				m := newMount(t, mem, kind.o, gated(g))
				other := mem.Session(nil)
				p := filepath.Join(m.dir, "f")
				if err := os.WriteFile(p, []byte(tc.before), 0o644); err != nil {
					t.Fatal(err)
				}
				f, err := os.Open(p)
				if err != nil {
					t.Fatal(err)
				}
				defer f.Close()
				buf := make([]byte, 64<<10) // read once: ReadAt reads until it meets the end
				if n, _ := unix.Pread(int(f.Fd()), buf, 0); string(buf[:n]) != tc.before {
					t.Fatalf("read %q before any change", buf[:n])
				}
				ino := inoOf(t, other, p)
				rewrite(t, other, ino, tc.after)

				held, release := holdOnce(g, kindIs(fsop.KindGetattr))
				read := make(chan string)
				go func() {
					n, _ := unix.Pread(int(f.Fd()), buf, 0)
					read <- string(buf[:n])
				}()
				select {
				case <-held:
				case s := <-read:
					t.Fatalf("the kernel did not ask, and read %q", s)
				}
				changed := make(chan struct{})
				go func() { tc.overtakes(t, other, ino); close(changed) }()
				select {
				case <-changed:
				case <-pacer.New(t).After(t, time.Second):
					t.Error("the change waited for the reader's question")
				}
				release()
				got := <-read
				<-changed
				ok := false
				for _, w := range tc.want {
					ok = ok || got == w
				}
				if !ok {
					t.Errorf("read %d bytes, %.20q, want one of %.50q", len(got), got, tc.want)
				}
				g.set(nil)
				if err := m.Invalidate(t.Context(), 0, []proto.Effect{{Ino: ino}}); err != nil {
					t.Error(err)
				}
			})
		}
	}
}

// rewrite gives a file other contents in one step as far as its size goes.
func rewrite(t *testing.T, h fsop.Handler, ino fsop.Ino, data string) {
	t.Helper()
	if len(data) > 0 {
		if _, err := h.Do(t.Context(), &fsop.Write{Ino: ino, Data: []byte(data)}); err != nil {
			t.Error(err)
		}
	}
	if _, err := h.Do(t.Context(), &fsop.Setattr{Ino: ino, Valid: fsop.SetSize, Size: uint64(len(data))}); err != nil {
		t.Error(err)
	}
}

func chmodVia(t *testing.T, h fsop.Handler, ino fsop.Ino) {
	t.Helper()
	if _, err := h.Do(t.Context(), &fsop.Setattr{Ino: ino, Valid: fsop.SetMode, Mode: 0o600}); err != nil {
		t.Error(err)
	}
}
