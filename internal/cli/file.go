package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"mortar/internal/api"
	"mortar/internal/daemon"
	"mortar/internal/fsop"
)

// newFile is the way to a volume's files where nothing can be mounted.
func newFile(a *app) *cobra.Command {
	cfg := daemon.MountConfig{Wait: 10 * time.Second}
	c := noun("file", "the files of a volume, without a mount",
		verb("ls <VOLNAME> [<PATH>]", "list a directory, or one file", 1, 2, func(ctx context.Context, args []string) error {
			return a.session(ctx, cfg, args[0], func(ctx context.Context, h fsop.Handler) error { return a.fileList(ctx, h, at(args, 1)) })
		}),
		verb("cat <VOLNAME> <PATH>", "print a file", 2, 2, func(ctx context.Context, args []string) error {
			return a.session(ctx, cfg, args[0], func(ctx context.Context, h fsop.Handler) error { return a.fileCat(ctx, h, args[1]) })
		}),
		verb("put <VOLNAME> <PATH>", "write standard input to a file", 2, 2, func(ctx context.Context, args []string) error {
			return a.session(ctx, cfg, args[0], func(ctx context.Context, h fsop.Handler) error { return a.filePut(ctx, h, args[1]) })
		}),
	)
	c.PersistentFlags().StringVar(&cfg.StateDir, "state-dir", daemon.DefaultStateDir, "the state `directory` of the daemon on this machine")
	c.PersistentFlags().StringVar(&cfg.RunDir, "run-dir", "", "the `directory` of its sockets (default: that of --socket)")
	return c
}

func at(args []string, i int) string {
	if i < len(args) {
		return args[i]
	}
	return "/"
}

func (a *app) session(ctx context.Context, cfg daemon.MountConfig, volume string, f func(ctx context.Context, h fsop.Handler) error) error {
	cfg.Volume = volume
	if cfg.RunDir == "" {
		cfg.RunDir = path.Dir(a.socket)
	}
	return daemon.Session(ctx, cfg, f)
}

// walk finds the inode of a path, as lookup would without following links.
func walk(ctx context.Context, h fsop.Handler, name string) (fsop.Attr, error) {
	at, err := fsop.Resolve(ctx, h, path.Clean("/"+name))
	if err != nil {
		return fsop.Attr{}, fmt.Errorf("%s: %w", name, err)
	}
	return at, nil
}

func parts(name string) []string {
	clean := strings.Trim(path.Clean("/"+name), "/")
	if clean == "" {
		return nil
	}
	return strings.Split(clean, "/")
}

// entry is a line of "file ls".
type entry struct {
	Name  string    `json:"name"`
	Mode  string    `json:"mode"`
	UID   uint32    `json:"uid"`
	GID   uint32    `json:"gid"`
	Size  uint64    `json:"size"`
	Mtime time.Time `json:"mtime"`
}

func entryOf(name string, at *fsop.Attr) entry {
	return entry{name, fileMode(at.Mode).String(), at.UID, at.GID, at.Size, time.Unix(0, at.Mtime).UTC()}
}

// fileMode is st_mode as Go writes it.
func fileMode(mode uint32) os.FileMode {
	m := os.FileMode(mode & 0o777)
	for bit, f := range map[uint32]os.FileMode{0o4000: os.ModeSetuid, 0o2000: os.ModeSetgid, 0o1000: os.ModeSticky} {
		if mode&bit != 0 {
			m |= f
		}
	}
	switch mode & 0o170000 {
	case 0o040000:
		m |= os.ModeDir
	case 0o120000:
		m |= os.ModeSymlink
	case 0o010000:
		m |= os.ModeNamedPipe
	case 0o140000:
		m |= os.ModeSocket
	case 0o020000:
		m |= os.ModeDevice | os.ModeCharDevice
	case 0o060000:
		m |= os.ModeDevice
	}
	return m
}

func (a *app) fileList(ctx context.Context, h fsop.Handler, name string) error {
	dir, err := walk(ctx, h, name)
	if err != nil {
		return err
	}
	list := []entry{}
	if !dir.IsDir() {
		list = append(list, entryOf(path.Base(name), &dir))
	}
	for cookie := uint64(0); dir.IsDir(); {
		r, err := h.Do(ctx, &fsop.Readdir{Ino: dir.Ino, Cookie: cookie, Max: 64 << 10, Plus: true})
		if err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
		if len(r.Entries) == 0 {
			break
		}
		for i := range r.Entries {
			e := &r.Entries[i]
			list = append(list, entryOf(e.Name, &e.Attr))
			cookie = e.Cookie
		}
	}
	return a.Show(list, func() {
		var rows [][]string
		for _, e := range list {
			rows = append(rows, []string{e.Mode, fmt.Sprintf("%d:%d", e.UID, e.GID), fmt.Sprint(e.Size), e.Mtime.Format(time.DateTime), e.Name})
		}
		a.Table([]string{"MODE", "OWNER", "SIZE", "CHANGED", "NAME"}, rows)
	})
}

func (a *app) fileCat(ctx context.Context, h fsop.Handler, name string) error {
	at, err := walk(ctx, h, name)
	if err != nil {
		return err
	}
	if !at.IsRegular() {
		return api.Errorf(api.Invalid, "%s is not a regular file", name)
	}
	for off := uint64(0); ; {
		r, err := h.Do(ctx, &fsop.Read{Ino: at.Ino, Off: off, Len: fsop.MaxData})
		if err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
		if len(r.Data) == 0 {
			return nil
		}
		if _, err := a.Out.Write(r.Data); err != nil {
			return err
		}
		off += uint64(len(r.Data))
	}
}

func (a *app) filePut(ctx context.Context, h fsop.Handler, name string) error {
	all := parts(name)
	if len(all) == 0 {
		return &usageError{text: name + " is the root directory"}
	}
	base := all[len(all)-1]
	dir, err := walk(ctx, h, strings.Join(all[:len(all)-1], "/"))
	if err != nil {
		return err
	}
	r, err := h.Do(ctx, &fsop.Create{Node: fsop.Node{Parent: dir.Ino, Name: base, Mode: 0o644, UID: uint32(os.Getuid()), GID: uint32(os.Getgid())}})
	if err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	if !r.Attr.IsRegular() {
		return api.Errorf(api.Invalid, "%s is not a regular file", name)
	}
	ino := r.Attr.Ino
	if _, err := h.Do(ctx, &fsop.Setattr{Ino: ino, Valid: fsop.SetSize}); err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	for off := uint64(0); ; {
		data := make([]byte, fsop.MaxData)
		n, err := io.ReadFull(a.In, data)
		if n > 0 {
			if _, err := h.Do(ctx, &fsop.Write{Ino: ino, Off: off, Data: data[:n]}); err != nil {
				return fmt.Errorf("%s: %w", name, err)
			}
			off += uint64(n)
		}
		if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
			return nil
		}
		if err != nil {
			return err
		}
	}
}
