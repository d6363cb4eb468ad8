package mount

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"testing"

	"golang.org/x/sys/unix"

	"mortar/internal/estate"
	"mortar/internal/fsop"
	"mortar/internal/fsop/memfs"
	"mortar/internal/mountinfo"
)

// nestedName as Options.FsName has the tests mount something inside, in a mount namespace of its own.
const nestedName = "mounted inside"

// testIDs is shared by all mounts of the tests' process.
var testIDs = new(mountinfo.IDs)

// namespace is a thread in a mount namespace of its own.
type namespace struct {
	todo, done chan func()
}

// newNamespace makes a copy of the test's mount namespace that lasts as long as the test.
func newNamespace(t testing.TB) *namespace {
	t.Helper()
	n := &namespace{todo: make(chan func()), done: make(chan func())}
	began, ended := make(chan error), make(chan struct{})
	go onOwnThread(func() {
		defer close(ended)
		err := unix.Unshare(unix.CLONE_NEWNS)
		if err == nil {
			err = unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, "")
		}
		began <- err
		for f := range n.todo {
			f()
			n.done <- f
		}
	})
	if err := <-began; err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { close(n.todo); <-ended })
	return n
}

func (n *namespace) do(f func()) { n.todo <- f; <-n.done }

// mountInside mounts a file system on dir, here or in a namespace. The function that is returned says
// whether it is still there.
func mountInside(t testing.TB, dir string, in *namespace) (there func() error) {
	t.Helper()
	do := func(f func()) { f() }
	if in != nil {
		do = in.do
	}
	var err error
	do(func() { err = unix.Mount("inside", dir, "tmpfs", 0, "size=1m") })
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { do(func() { unix.Unmount(dir, unix.MNT_DETACH) }) })
	mark := filepath.Join(dir, "mark of the inner file system")
	do(func() {
		var fd int
		if fd, err = unix.Open(mark, unix.O_CREAT|unix.O_WRONLY|unix.O_CLOEXEC, 0o600); err == nil {
			unix.Close(fd)
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	return func() (err error) {
		do(func() { err = unix.Access(mark, unix.F_OK) })
		return err
	}
}

// What is mounted inside stays there, in every mount namespace, whatever other machines change, as
// long as it is not the directory's own name.
func TestMountedInside(t *testing.T) {
	for _, kind := range kinds {
		t.Run(kind.name, func(t *testing.T) {
			mem, g := memfs.New(), &gate{}
			a, b := newMount(t, mem, kind.o), newMount(t, mem, kind.o, gated(g))
			in := func(m *mounted, p string) string { return filepath.Join(m.dir, p) }
			must := func(err error) {
				t.Helper()
				if err != nil {
					t.Fatal(err)
				}
			}
			for _, d := range []string{"www", "www/uploads", "www/there", "www/moved"} {
				must(os.Mkdir(in(a, d), 0o755))
			}
			must(os.WriteFile(in(a, "www/file"), []byte("1"), 0o644))
			ns := newNamespace(t)
			here, there := mountInside(t, in(b, "www/uploads"), nil), mountInside(t, in(b, "www/there"), ns)
			stays := func(after string) {
				t.Helper()
				must(errors.Join(after1(after, "here", here()), after1(after, "in another namespace", there())))
			}
			stays("nothing")

			const owner = 4711
			for _, p := range []string{"www/file", "www", "www/uploads", "www/there"} {
				must(os.Chown(in(a, p), owner, owner))
				stays("chown of " + p)
			}
			root, err := unix.Open(b.dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0) // the way there is root's
			must(err)
			defer unix.Close(root)
			must(as(owner, func() error { return unix.Fchmodat(root, "www/file", 0o600, 0) }))

			must(b.DropAll(t.Context()))
			stays("DropAll")

			for i := range 20 {
				// Something that has the lock of www in b's kernel, known as a change or not.
				kind, begin := fsop.KindMkdir, func(p string) error { return os.Mkdir(p, 0o755) }
				if i%2 == 0 {
					kind, begin = fsop.KindLookup, func(p string) error {
						if err := unix.Access(p, unix.F_OK); err != unix.ENOENT {
							return fmt.Errorf("lookup: %v", err)
						}
						return nil
					}
				}
				absent, gone := fmt.Sprint("www/absent", i), fmt.Sprint("www/gone", i)
				must(os.WriteFile(in(a, gone), nil, 0o644))
				if size(in(b, absent)) != -1 || size(in(b, gone)) != 0 {
					t.Fatal("names before")
				}
				held, release := holdOnce(g, kindIs(kind))
				done := make(chan error, 1)
				go func() { done <- begin(in(b, fmt.Sprint("www/held", i))) }()
				<-held
				must(os.WriteFile(in(a, absent), []byte("22"), 0o644))
				must(os.Remove(in(a, gone)))
				must(os.Chown(in(a, "www/file"), i, i))
				release()
				g.set(nil)
				must(<-done)
				if got := size(in(b, absent)); got != 2 {
					t.Errorf("a name that was made has %d bytes", got)
				}
				if got := size(in(b, gone)); got != -1 {
					t.Errorf("a name that was removed has %d bytes", got)
				}
				stays("names changed where the directory's lock was held")
			}

			// The kernel does this with every network file system.
			moved := mountInside(t, in(b, "www/moved"), ns)
			must(os.Rename(in(a, "www/moved"), in(a, "www/to")))
			if size(in(b, "www/to")) < 0 || moved() != unix.ENOENT {
				t.Errorf("what was mounted on a directory that was moved: %v", moved())
			}
			stays("rename of another directory")
		})
	}
}

func after1(after, where string, err error) error {
	if err != nil {
		return fmt.Errorf("after %s what is mounted inside, %s: %w", after, where, err)
	}
	return nil
}

// What is mounted inside stays there when another process serves the file system.
func TestMountedInsideSuccession(t *testing.T) {
	needFUSE(t)
	dir, fs := t.TempDir(), memfs.New()
	var mounts [2]*Mount
	var estates [2]*estate.Estate
	var handlers [2]fsop.Handler
	for i := range mounts {
		e, err := estate.New()
		if err != nil {
			t.Fatal(err)
		}
		defer e.Close()
		estates[i], mounts[i] = e, New(Options{AllowOther: true, Estate: e, ids: testIDs})
		handlers[i] = fs.Session(mounts[i])
	}
	ended := make(chan error, 2)
	serve := func(ctx context.Context, i int) {
		go func() { ended <- mounts[i].Serve(ctx, dir, handlers[i]) }()
		select {
		case <-mounts[i].Ready():
		case err := <-ended:
			t.Fatal(err)
		}
	}
	serve(context.Background(), 0)
	for _, d := range []string{"/www", "/www/uploads"} {
		if err := os.Mkdir(dir+d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	life, end := context.WithCancel(context.Background())
	t.Run("adopted", func(t *testing.T) {
		there := mountInside(t, dir+"/www/uploads", newNamespace(t))
		resume, err := mounts[0].Pause(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		defer resume()
		left, err := estate.Read(estates[0].Fd())
		if err != nil {
			t.Fatal(err)
		}
		fd, err := unix.FcntlInt(uintptr(mounts[0].Fuse(-1)), unix.F_DUPFD_CLOEXEC, 3)
		if err != nil {
			t.Fatal(err)
		}
		if err := mounts[1].Adopt(fd, dir, left); err != nil {
			t.Fatal(err)
		}
		serve(life, 1)
		if err := there(); err != nil {
			t.Errorf("what is mounted inside: %v", err)
		}
		if err := unix.Access(dir+"/www", unix.F_OK); err != nil {
			t.Error(err)
		}
		if err := there(); err != nil {
			t.Errorf("what is mounted inside, after a look at the directory above: %v", err)
		}
	})
	end()
	for range mounts {
		if err := <-ended; err != nil && !errors.Is(err, context.Canceled) {
			t.Error(err)
		}
	}
	runtime.KeepAlive(handlers)
}

// A file is given away while the kernel has the answer to come of who owned it before: it asks once more.
func TestOvertakenRights(t *testing.T) {
	for _, kind := range kinds {
		t.Run(kind.name, func(t *testing.T) {
			mem, g := memfs.New(), &gate{}
			m := newMount(t, mem, kind.o, gated(g))
			other := mem.Session(nil)
			path := filepath.Join(m.dir, "f")
			if err := os.WriteFile(path, nil, 0o644); err != nil {
				t.Fatal(err)
			}
			root, err := unix.Open(m.dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
			if err != nil {
				t.Fatal(err)
			}
			defer unix.Close(root)
			ino := inoOf(t, other, path)
			give := func(to uint32) {
				if _, err := other.Do(t.Context(), &fsop.Setattr{Ino: ino, Valid: fsop.SetUID, UID: to}); err != nil {
					t.Error(err)
				}
			}
			for i := range 10 {
				before, now := uint32(4000+i), uint32(5000+i)
				give(before)
				held, release := holdOnce(g, kindIs(fsop.KindLookup))
				asked := make(chan struct{})
				go func() {
					defer close(asked)
					fd, err := unix.Open(path, unix.O_PATH|unix.O_CLOEXEC, 0) // asks for no attributes besides
					if err != nil {
						t.Error(err)
						return
					}
					unix.Close(fd)
				}()
				<-held
				give(now)
				release()
				<-asked
				g.set(nil)
				if err := as(int(now), func() error { return unix.Fchmodat(root, "f", 0o600, 0) }); err != nil {
					t.Errorf("round %d: chmod by the new owner: %v", i, err)
				}
			}
		})
	}
}
