package meta

import (
	"context"
	"fmt"
	"strings"

	"github.com/cockroachdb/pebble/v2/sstable"
	"github.com/cockroachdb/pebble/v2/sstable/blob"
	"github.com/cockroachdb/pebble/v2/vfs"
)

// The library ends the process where it finds that a file of values is missing, or
// cannot be opened (v2.1.7: reportCorruption of nil), also while it compacts, so
// that a damaged store would end every process that opens it. What follows finds such
// files before it does: those that are missing when the store is opened, and those
// that have no proper end when they are.

const blobSuffix = ".blob"

// blobs adds the names of the files of values to names.
func (s *Store) blobs(names map[string]bool) error {
	all, err := s.opts.FS.List(s.opts.Dir)
	for _, n := range all {
		if strings.HasSuffix(n, blobSuffix) {
			names[n] = true
		}
	}
	return err
}

// missingBlobs is an error if fewer files of values are there than the store has. names are
// those that were there before it was opened; the store may have removed some since
// that it does not have any more, or made new ones.
func (s *Store) missingBlobs(names map[string]bool) error {
	live := s.db.Metrics().BlobFiles.LiveCount
	if err := s.blobs(names); err != nil {
		return err
	}
	if uint64(len(names)) >= live {
		return nil
	}
	return fmt.Errorf("%w: %d of its %d files of values (*%s) are missing", ErrDamaged, live-uint64(len(names)), live, blobSuffix)
}

// Open is the FS's, and sees to it that a file of values is one.
func (fs hookFS) Open(name string, opts ...vfs.OpenOption) (vfs.File, error) {
	f, err := fs.FS.Open(name, opts...)
	if err != nil || !strings.HasSuffix(name, blobSuffix) {
		return f, err
	}
	r, err := sstable.NewSimpleReadable(f)
	if err == nil {
		_, err = blob.NewFileReader(context.Background(), r, blob.FileReaderOptions{})
	}
	if err == nil {
		return f, nil
	}
	f.Close()
	if Damaged(err) {
		// As an error of the disk: the library knows what to do about those.
		err = fmt.Errorf("%w: %s: %s", ErrDamaged, name, err.Error())
		fs.s.fail(err)
	}
	return nil, err
}

// caught turns the library's panic about a file of values into the error that it is about.
func caught(err *error) {
	p := recover()
	if p == nil {
		return
	}
	if text := fmt.Sprint(p); strings.Contains(text, "unknown metadata type: <nil>") {
		*err = fmt.Errorf("%w: a file of values (*%s) is missing", ErrDamaged, blobSuffix)
		return
	}
	panic(p)
}
