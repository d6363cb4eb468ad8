package e2e

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"
)

// A byte that flips in a quiet file is found by a scrub, named, and repaired from the
// other machine, of which there is only one.
func TestRot(t *testing.T) {
	p := start(t, setup{hosts: 2, mounts: 1, options: []string{"scrub-quiet", "0"}})
	p.run(1, "sh", "-c", "mkdir /mnt/wp/dir; dd if=/dev/urandom of=/mnt/wp/dir/file bs=64K count=16 conv=fsync status=none")
	type brick struct {
		Name  string
		Scrub *struct {
			State                            string
			Signed, Checked, Found, Repaired int
			Rotten                           int
		}
	}
	scrubbed := func(until func(b brick) bool) {
		p.t.Helper()
		p.within(30*time.Second, "the bricks are scrubbed", func() (err error) {
			var st struct{ Bricks []brick }
			p.json(&st, 2, "volume", "scrub", "wp", "status", "--json")
			rest := len(st.Bricks) == 2
			for _, b := range st.Bricks {
				if b.Scrub == nil || !until(b) {
					err = errors.Join(err, fmt.Errorf("%+v: %+v", b.Name, b.Scrub))
				}
				rest = rest && b.Scrub != nil && b.Scrub.State == "idle"
			}
			if len(st.Bricks) != 2 {
				return fmt.Errorf("%d bricks", len(st.Bricks))
			}
			if err != nil && rest { // not before: with a round begins a new count of what it has looked at
				p.mortar(1, "volume", "scrub", "wp", "start")
			}
			return err
		})
	}
	scrubbed(func(b brick) bool { return b.Scrub.Signed+b.Scrub.Checked >= 8 })
	for i := 1; i <= 2; i++ {
		file := strings.TrimSpace(p.run(i, "sh", "-c", "find "+brickDir+"/.mortar/data -type f -size +1000k"))
		good, err := os.ReadFile(p.outside(i, file))
		if err != nil {
			t.Fatal(err)
		}
		// One byte, as a disk would: a file that is written anew while a scrub reads it is
		// found torn, and the repair counted is that of a block that had not rotted.
		disk, err := os.OpenFile(p.outside(i, file), os.O_WRONLY, 0)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := disk.WriteAt([]byte{good[700<<10] ^ 4}, 700<<10); err != nil {
			t.Fatal(err)
		}
		if err := disk.Close(); err != nil {
			t.Fatal(err)
		}
		scrubbed(func(b brick) bool {
			return !strings.HasPrefix(b.Name, fmt.Sprintf("n%d:", i)) || b.Scrub.Found == 1 && b.Scrub.Repaired == 1 && b.Scrub.Rotten == 0
		})
		if now, err := os.ReadFile(p.outside(i, file)); err != nil || !bytes.Equal(now, good) {
			t.Errorf("n%d: the data file is not what it was: %v", i, err)
		}
		if log := p.Host(i).Log("mortar"); !strings.Contains(log, "/dir/file") {
			t.Errorf("n%d does not name the file:\n%s", i, log)
		}
	}
	p.identical(1)
}
