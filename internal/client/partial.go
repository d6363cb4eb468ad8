package client

import (
	"context"
	"errors"

	"mortar/internal/fsop"
)

// partial is the Handler that writes what a subvolume's limit leaves room for. The set
// takes a write as a whole or refuses it, with EDQUOT above the limit; a write(2) that does
// not fit is expected to write as far as it does.
//
// A write that its caller waits for ends where the room does: fsop.Reply's Short says
// where. Of one that an application was told had succeeded (fsop.WindowHeld) all that
// fits is written, and the error remains.
type partial struct{ next fsop.Handler }

// quotaBlock is what limits count in.
const quotaBlock = 4096

// Do implements fsop.Handler.
func (p *partial) Do(ctx context.Context, op fsop.Op) (*fsop.Reply, error) {
	reply, err := p.next.Do(ctx, op)
	w, ok := op.(*fsop.Write)
	if !ok || !errors.Is(err, fsop.EDQUOT) {
		return reply, err
	}
	for from := 0; ; {
		n, part, perr := p.fit(ctx, w, from)
		switch {
		case perr != nil && !errors.Is(perr, fsop.EDQUOT):
			return nil, perr
		case perr != nil:
			return reply, err
		case w.Window&fsop.WindowHeld == 0:
			part.Short = fsop.Short(n)
			return part, nil
		}
		from += n
	}
}

// fit writes less of what w has behind its first from bytes than all, by halves, until it
// fits; it ends with whole blocks. n is how much it was.
func (p *partial) fit(ctx context.Context, w *fsop.Write, from int) (n int, reply *fsop.Reply, err error) {
	at := w.Off + uint64(from)
	end := w.Off + uint64(len(w.Data))
	for {
		half := (at + (end-at)/2) / quotaBlock * quotaBlock
		if half <= at {
			half = (at/quotaBlock + 1) * quotaBlock // the rest of a block may be there already
		}
		if half >= end {
			return 0, nil, fsop.EDQUOT
		}
		end = half
		n = int(end - at)
		part := *w
		part.Off, part.Data, part.Then = at, w.Data[from:from+n], fsop.Setattr{}
		part.Window &^= fsop.WindowDone
		reply, err = p.next.Do(ctx, &part)
		if err == nil || !errors.Is(err, fsop.EDQUOT) {
			return n, reply, err
		}
	}
}
