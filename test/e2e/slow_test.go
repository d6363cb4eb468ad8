package e2e

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"mortar/test/cluster"
)

// blkio is where the kernel's throttling of block devices is, if it is there (cgroup v1).
const blkio = "/sys/fs/cgroup/blkio"

// crawl makes the disk of a host take no more than so many bytes per second from the host's daemon, and returns what
// undoes it. The machine may not be able to.
func (p *pool) crawl(i int, rate int) (undo func(), err error) {
	p.t.Helper()
	group := filepath.Join(blkio, fmt.Sprintf("mortar-test-%d-%d", os.Getpid(), i))
	if err := os.Mkdir(group, 0o755); err != nil {
		return nil, err
	}
	device := strings.TrimSpace(p.run(i, "mountpoint", "-d", "/bricks"))
	write := func(file, text string) error { return os.WriteFile(file, []byte(text), 0) }
	limit := filepath.Join(group, "blkio.throttle.write_bps_device")
	undo = func() {
		if _, err := os.Stat(group); err != nil {
			return // it was undone
		}
		write(limit, device+" 0") // what waits goes on
		all, _ := os.ReadFile(filepath.Join(group, "cgroup.procs"))
		for _, pid := range strings.Fields(string(all)) {
			write(filepath.Join(blkio, "cgroup.procs"), pid)
		}
		p.within(10*time.Second, "the group of a slow disk is removed", func() error { return os.Remove(group) })
	}
	p.t.Cleanup(undo)
	// A program that writes as much as the disk takes in a second, and waits for it, shows whether it is slow.
	begin := time.Now()
	probe := exec.Command("sh", "-ec", "echo $$ >"+group+"/cgroup.procs; exec dd if=/dev/zero of="+p.outside(i, "/bricks/probe")+
		fmt.Sprintf(" bs=64K count=%d conv=fsync status=none", rate>>16))
	if err = write(limit, fmt.Sprintf("%s %d", device, rate)); err == nil {
		if out, rerr := probe.CombinedOutput(); rerr != nil {
			err = fmt.Errorf("%w: %s", rerr, out)
		} else if took := time.Since(begin); took < time.Second/2 {
			err = fmt.Errorf("a second's bytes were written in %v", took)
		} else {
			err = write(filepath.Join(group, "cgroup.procs"), fmt.Sprint(p.daemons[i-1].Pid()))
		}
	}
	p.run(i, "rm", "-f", "/bricks/probe")
	if err != nil {
		undo()
		return nil, err
	}
	return undo, nil
}

// The disk under one brick takes 1 MB/s, and much is written and synced: the brick leaves the set, whether it leads or
// not, those who sync wait no longer than for a silent one, and when the disk is well again it is healed.
func TestSlowDisk(t *testing.T) {
	if _, err := os.Stat(blkio + "/cgroup.procs"); err != nil {
		t.Skipf("SKIPPED: no throttling of block devices on this machine (TestCrawlingDisk has slow disks in one process): %v", err)
	}
	p := start(t, setup{disk: cluster.XFS, diskBytes: 1 << 30})
	for _, role := range pick([]string{"primary"}, []string{"primary", "backup"}) {
		i := p.primary(1)
		if role == "backup" {
			i = p.other(i)
		}
		writer := p.other(i)
		undo, err := p.crawl(i, 1<<20)
		if err != nil {
			t.Skipf("SKIPPED: this machine does not throttle block devices: %v", err)
		}
		l := p.startLoadOn(writer, "slow-"+role, stall+2*time.Second, "-fsync")
		begin, machine := time.Now(), cluster.Share()
		bulk := p.async(writer, time.Minute, "dd", "if=/dev/zero", "of=/mnt/wp/bulk-"+role, "bs=1M", "count=16", "conv=fsync", "status=none")
		p.within(20*time.Second, "the brick leaves the set", func() error {
			st, err := p.status(writer)
			if err == nil && (st.Bricks[i-1].InSync || st.Sets[0].InSync != 2 || st.Sets[0].Primary == st.Bricks[i-1].Name || st.Sets[0].Primary == "") {
				err = fmt.Errorf("%+v", st)
			}
			return err
		})
		err = bulk()
		took := time.Since(begin)
		t.Logf("16 MiB were written and synced in %v, with %s", took, machine)
		if err != nil || took > machine.Bound(10*time.Second) { // 16 s by that disk
			t.Error(errors.Join(err, fmt.Errorf("16 MiB were written and synced in %v", took)))
		}
		l.goesOn(10 * time.Second)
		undo()
		p.healed(writer, 60*time.Second)
		l.end()
		l.check(writer, i)
	}
}
