package brick

import (
	"errors"
	"fmt"
	"hash/crc32"
	"io/fs"
	"strconv"
	"strings"

	"mortar/internal/cluster"
	"mortar/internal/disk"
)

// Promise has the brick remember, durably, that it takes part in no epoch
// before e any more. It has the same single caller as Execute.
func (b *Brick) Promise(e cluster.Epoch) error {
	if e <= b.promised {
		return nil
	}
	if err := disk.WriteFile(b.opts.FS, b.path(epochName), encodePromise(e)); err != nil {
		return b.fail(fmt.Errorf("remembering epoch %d: %w", e, err))
	}
	b.promised = e
	return nil
}

// Promised returns the epoch of the last Promise, 0 if there was none.
func (b *Brick) Promised() cluster.Epoch { return b.promised }

func (b *Brick) readPromise() error {
	raw, err := disk.ReadFile(b.opts.FS, b.path(epochName), 64)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	e, ok := decodePromise(string(raw))
	if !ok {
		return &damaged{fmt.Errorf("%s does not hold the number of an epoch", b.path(epochName))}
	}
	b.promised = e
	return nil
}

// encodePromise writes an epoch as a number and its checksum: one digit that is another
// would make the brick follow, or lead, an epoch that is over.
func encodePromise(e cluster.Epoch) []byte {
	n := strconv.FormatUint(uint64(e), 10)
	return fmt.Appendf(nil, "%s %08x\n", n, crc32.Checksum([]byte(n), castagnoli))
}

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// decodePromise reads what encodePromise wrote, or what was written before there were checksums.
func decodePromise(s string) (cluster.Epoch, bool) {
	line, ok := strings.CutSuffix(s, "\n")
	n, sum, summed := strings.Cut(line, " ")
	e, err := strconv.ParseUint(n, 10, 64)
	if !ok || err != nil || summed && sum != fmt.Sprintf("%08x", crc32.Checksum([]byte(n), castagnoli)) {
		return 0, false
	}
	return cluster.Epoch(e), true
}
