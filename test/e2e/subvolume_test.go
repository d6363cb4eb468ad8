package e2e

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

type subvolume struct {
	Name       string
	Size       uint64
	UsedSize   uint64 `json:"used_size"`
	UsedInodes uint64 `json:"used_inodes"`
	Users      []struct{ Peer, Client string }
}

func (p *pool) subvolume(i int, name string) (s subvolume) {
	p.t.Helper()
	p.json(&s, i, "subvolume", "info", name, "--json")
	return s
}

// df is the room that a path shows.
func (p *pool) df(path string) (total, free, files, filesFree uint64) {
	p.t.Helper()
	var st unix.Statfs_t
	if err := unix.Statfs(path, &st); err != nil {
		p.t.Fatal(err)
	}
	return st.Blocks * uint64(st.Bsize), st.Bavail * uint64(st.Bsize), st.Files, st.Ffree
}

// A subvolume's limits are exact for writers on several machines, whether they mount
// it or the whole volume; df shows them; nothing moves out of it by rename; and it is
// not deleted while a machine mounts it.
func TestSubvolume(t *testing.T) {
	const size, inodes = 1 << 20, 20
	p := start(t, setup{mounts: 2})
	p.mortar(2, "subvolume", "create", "wp/site", "--size", "1MB", "--inodes", fmt.Sprint(inodes), "--mode", "0777")
	p.run(3, "mkdir", "-p", "/mnt/wp")
	p.mortar(3, "mount", "n3,n1:/wp/site", "/mnt/wp")
	whole, part := p.outside(1, "/mnt/wp/site"), p.outside(3, "/mnt/wp")

	for _, dir := range []string{whole, part} {
		if total, free, files, filesFree := p.df(dir); total != size || free != size || files != inodes || filesFree != inodes-1 {
			t.Errorf("df of %s: %d of %d bytes, %d of %d inodes", dir, free, total, filesFree, files)
		}
	}
	if total, _, _, _ := p.df(p.outside(1, "/mnt/wp")); total <= size {
		t.Errorf("the whole volume has %d bytes", total)
	}
	var out [2]*os.File
	for i, path := range []string{filepath.Join(whole, "a"), filepath.Join(part, "b")} {
		f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR|os.O_SYNC, 0o644)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		out[i] = f
	}
	block := make([]byte, 4096)
	blocks := 0
	for ; blocks < 2*size/4096; blocks++ {
		if _, err := out[blocks%2].Write(block); errors.Is(err, syscall.EDQUOT) {
			break
		} else if err != nil {
			t.Fatal(err)
		}
	}
	if blocks != size/4096 {
		t.Errorf("%d blocks fitted into %d", blocks, size/4096)
	}
	if _, err := out[0].WriteAt(block, 0); err != nil {
		t.Errorf("over what is there: %v", err)
	}
	if _, free, _, _ := p.df(part); free != 0 {
		t.Errorf("df says that %d bytes are free", free)
	}
	if s := p.subvolume(1, "wp/site"); s.UsedSize != size || s.UsedInodes != 3 || len(s.Users) != 1 || s.Users[0].Client != "n3:/mnt/wp" {
		t.Errorf("%+v", s)
	}
	if err := out[1].Truncate(4096); err != nil {
		t.Fatal(err)
	}
	const given = size/2 - 4096
	if _, free, _, _ := p.df(whole); free != given {
		t.Errorf("after half of it was given back, df says that %d bytes are free", free)
	}
	// What a program writes at once fits as far as there is room, as on any file system.
	big := filepath.Join(whole, "big")
	n, err := 0, error(nil)
	if f, oerr := os.Create(big); oerr != nil {
		t.Fatal(oerr)
	} else {
		n, err = f.Write(make([]byte, 2*size))
		if cerr := f.Close(); err == nil {
			err = cerr
		}
	}
	if !errors.Is(err, syscall.EDQUOT) {
		t.Errorf("%d bytes written, %v", n, err)
	}
	if s := p.subvolume(3, "wp/site"); s.UsedSize != size {
		t.Errorf("after a large write %d of %d bytes are used", s.UsedSize, size)
	}

	// The kernel writes pages of mapped files back by itself, and keeps of the error only this.
	if err := out[1].Truncate(2 * 4096); err != nil {
		t.Fatal(err)
	}
	page, err := unix.Mmap(int(out[1].Fd()), 4096, 4096, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		t.Fatal(err)
	}
	page[0] = 'x'
	if err := unix.Msync(page, unix.MS_SYNC); err != syscall.ENOSPC {
		t.Errorf("msync of a page for which there is no room: %v", err)
	}
	if err := unix.Munmap(page); err != nil {
		t.Fatal(err)
	}

	made := 4 // with the top directory
	for ; made < 2*inodes; made++ {
		dir := []string{whole, part}[made%2]
		if err := os.Mkdir(filepath.Join(dir, fmt.Sprint("d", made)), 0o755); errors.Is(err, syscall.EDQUOT) {
			break
		} else if err != nil {
			t.Fatal(err)
		}
	}
	if made != inodes {
		t.Errorf("%d inodes fitted into %d", made, inodes)
	}
	if err := os.Rename(big, p.outside(1, "/mnt/wp/big")); !errors.Is(err, syscall.EXDEV) {
		t.Errorf("rename out of it: %v", err)
	}
	if err := os.Link(big, p.outside(1, "/mnt/wp/big")); !errors.Is(err, syscall.EXDEV) {
		t.Errorf("link out of it: %v", err)
	}
	p.run(1, "mv", "/mnt/wp/site/big", "/mnt/wp/big") // which copies

	p.refuse(2, []string{"subvolume", "delete", "wp/site"}, "wp/site is in use by n3:/mnt/wp")
	p.mortar(2, "subvolume", "rename", "wp/site", "home")
	p.mortar(2, "subvolume", "resize", "wp/home", "2MB")
	if total, _, _, _ := p.df(part); total != 2<<20 {
		t.Errorf("df of the mount says %d bytes after it was renamed and made larger", total)
	}
	for _, f := range out {
		f.Close()
	}
	p.run(3, "umount", "/mnt/wp")
	p.within(5*time.Second, "nobody uses it", func() error {
		if s := p.subvolume(1, "wp/home"); len(s.Users) > 0 {
			return fmt.Errorf("%+v", s)
		}
		return nil
	})
	// Gluster's words, for a directory with something in it that a program has open.
	full := p.outside(1, "/mnt/wp/full")
	if err := os.MkdirAll(filepath.Join(full, "deep"), 0o755); err != nil {
		t.Fatal(err)
	}
	f, err := os.OpenFile(filepath.Join(full, "deep/f"), os.O_CREATE|os.O_WRONLY|os.O_SYNC, 0o644)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.Write(make([]byte, 24*4096)); err != nil {
		t.Fatal(err)
	}
	p.mortar(2, "volume", "quota", "wp", "limit-usage", "/full", fmt.Sprint(28*4096))
	for k := range 5 {
		if _, err := f.Write(block); k < 4 && err != nil || k == 4 && !errors.Is(err, syscall.EDQUOT) {
			t.Errorf("block %d of the four that are left: %v", k+1, err)
		}
	}
	if s := p.subvolume(3, "wp/full"); s.UsedSize != 28*4096 || s.UsedInodes != 3 {
		t.Errorf("%+v", s)
	}

	p.mortar(2, "subvolume", "delete", "wp/home")
	if _, err := os.Stat(p.outside(1, "/mnt/wp/home")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("after it was deleted: %v", err)
	}
	p.identical(1)
}

// A deletion goes on when the machine that leads is killed, leaves nothing, and
// nobody sees it.
func TestSubvolumeDeletion(t *testing.T) {
	dirs, files := pick(8, 20), pick(150, 500)
	p := start(t, setup{mounts: 1})
	p.mortar(1, "subvolume", "create", "wp/big")
	top := p.outside(1, "/mnt/wp/big")
	for d := range dirs {
		dir := filepath.Join(top, fmt.Sprintf("d%d/in/deep", d))
		if err := os.MkdirAll(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		for f := range files {
			if err := os.WriteFile(filepath.Join(dir, fmt.Sprint(f)), []byte("x"), 0o644); err != nil {
				t.Fatal(err)
			}
		}
	}
	want := uint64(1 + dirs*(3+files))
	if s := p.subvolume(2, "wp/big"); s.UsedInodes != want || s.UsedSize != uint64(dirs*files*4096) {
		t.Errorf("%+v; want %d inodes", s, want)
	}
	at := p.primary(1)
	p.mortar(p.other(at), "subvolume", "delete", "wp/big")
	p.killDaemon(at)
	ask := p.other(at)
	var list []subvolume
	p.json(&list, ask, "subvolume", "list", "wp", "--json")
	if len(list) != 0 {
		t.Errorf("the deleted subvolume is listed: %+v", list)
	}
	p.within(30*time.Second, "everything of it is gone", func() error {
		var r struct{ Digests []struct{ Inodes uint64 } }
		// A brick is away, so the comparison as a whole fails.
		res, _ := p.try(ask, "volume", "heal", "wp", "full", "--verify", "--json")
		if err := json.Unmarshal([]byte(res.Stdout), &r); err != nil {
			return fmt.Errorf("%w: %s", err, res.Stdout)
		}
		left := []uint64{}
		for _, d := range r.Digests {
			if d.Inodes > 0 {
				left = append(left, d.Inodes)
			}
		}
		if !slices.Equal(left, []uint64{1, 1}) { // the root directory
			return fmt.Errorf("there are inodes %v", left)
		}
		return nil
	})
	p.startDaemon(at)
	p.waitDaemon(at)
	p.healed(1, 30*time.Second)
	p.identical(1)
	p.mortar(1, "subvolume", "create", "wp/big") // the name is free
}
