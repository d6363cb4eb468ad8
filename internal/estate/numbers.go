package estate

import (
	"context"
	"maps"
	"slices"
	"sync"
)

// Numbers gives a session's changes their numbers, knows below which all have been
// answered, and which belong to requests of the kernel that were not.
//
// A change that succeeded counts as answered when the kernel has the answer: until
// then the kernel may send the request again, to the next process, which asks for the
// change under the same number and is told what was answered to the one before. One that
// failed has changed nothing, and may be tried again under another number.
//
// None runs further ahead of one that has no answer than the replicas remember: behind that they
// could not tell a change that was carried out from one that never came, and would have to
// refuse both. A wait for a lock may fall behind, since it can be asked for again.
type Numbers struct {
	e *Estate // nil: nobody comes after

	// Ahead is how far numbers may run ahead of one that has no answer. It is set before the first Begin.
	Ahead uint64

	mu       sync.Mutex
	base     uint64              // all below are answered
	given    []given             // given[i] is base+i
	firm     uint64              // the first that has no answer and must not fall behind, or the next
	changed  chan struct{}       // closed when firm moves; nil if nobody waits
	open     *Table              // those that are not answered: session, request, inode
	requests map[uint64][]uint64 // the numbers of those that made changes
	taken    *Table              // requests whose writes were acknowledged, or are about to be

	// Of the process before this one.
	again map[uint64][]Again // by request; those that come again are taken out
	over  bool               // no request comes again any more
	was   map[uint64]bool    // taken
	void  func(number uint64, a Again)
}

// given is what became of a number. out: it has ended, and its request not yet.
type given struct{ answered, wait, out bool }

// Again is a change that the process before this one may have had carried out.
type Again struct {
	Number, Session, Ino uint64
}

// maxBehind is how far behind the last number one may be that counts yet: no set remembers so much.
const maxBehind = 1 << 20

func newNumbers(e *Estate, open, taken *Table) *Numbers {
	return &Numbers{e: e, Ahead: 1 << 62, base: 1, firm: 1, open: open, taken: taken, requests: make(map[uint64][]uint64), over: true}
}

// KernelRequest is what the context of a request of the kernel's says its number is.
type KernelRequest interface{ KernelRequest() uint64 }

// RequestKey is the key of a KernelRequest in a context.
type RequestKey struct{}

// resent is set in the numbers of requests that the kernel sends again.
const resent = 1 << 63

// RequestOf returns the number of the kernel's request that ctx is of, 0 if it is of none.
func RequestOf(ctx context.Context) uint64 {
	if r, ok := ctx.Value(RequestKey{}).(KernelRequest); ok {
		return r.KernelRequest() &^ resent
	}
	return 0
}

// IsResent reports whether the kernel says of a request that it sends it again.
func IsResent(unique uint64) bool { return unique&resent != 0 }

// Change is one that is to have a number.
type Change struct {
	Request uint64 // of the kernel, 0: of none
	Session uint64
	Ino     uint64 // the file that it is a write to
	Wait    bool   // it is a wait for a lock
}

// Given is the number of a change.
type Given struct {
	Number  uint64
	Session uint64 // under which it may have been carried out
	Again   bool   // it had the number in the process before this one
}

// Begin returns a number for a change, as soon as it may be used. If its request comes again, it
// is the number that it had before.
func (n *Numbers) Begin(ctx context.Context, c Change) (Given, error) {
	for {
		n.mu.Lock()
		if g, ok := n.beginLocked(c); ok {
			n.mu.Unlock()
			return g, nil
		}
		if n.changed == nil {
			n.changed = make(chan struct{})
		}
		changed := n.changed
		n.mu.Unlock()
		select {
		case <-changed:
		case <-ctx.Done():
			return Given{}, ctx.Err()
		}
	}
}

func (n *Numbers) beginLocked(c Change) (g Given, ok bool) {
	if all := n.again[c.Request]; c.Request != 0 && len(all) > 0 {
		if n.again[c.Request] = all[1:]; len(all) == 1 {
			delete(n.again, c.Request)
		}
		g = Given{all[0].Number, all[0].Session, true}
	} else {
		g = Given{n.base + uint64(len(n.given)), c.Session, false}
		if g.Number >= n.firm+n.Ahead {
			return Given{}, false
		}
		n.given = append(n.given, given{wait: c.Wait})
		n.passLocked()
		if n.e != nil {
			n.e.store(wordNext, g.Number+1)
		}
		n.open.Put(g.Number, c.Session, c.Request, c.Ino)
	}
	if c.Request != 0 {
		n.requests[c.Request] = append(n.requests[c.Request], g.Number)
	}
	return g, true
}

// End says that a change was answered, or never sent, and whether it was carried out.
func (n *Numbers) End(number uint64, out bool) {
	n.mu.Lock()
	defer n.mu.Unlock()
	request := n.open.Get(number)[1]
	if i := slices.Index(n.requests[request], number); i >= 0 {
		if out {
			n.given[number-n.base].out = true
			return
		}
		n.requests[request] = slices.Delete(n.requests[request], i, i+1)
	}
	n.finishLocked(number)
}

func (n *Numbers) finishLocked(number uint64) {
	n.open.Delete(number)
	n.given[number-n.base].answered = true
	i := 0
	for i < len(n.given) && n.given[i].answered {
		i++
	}
	n.base += uint64(i)
	n.given = slices.Delete(n.given, 0, i)
	n.passLocked()
}

// passLocked moves firm past what is answered or may fall behind.
func (n *Numbers) passLocked() {
	was := n.firm
	n.firm = max(n.firm, n.base)
	for end := n.base + uint64(len(n.given)); n.firm < end; n.firm++ {
		if g := n.given[n.firm-n.base]; !g.answered && !g.wait {
			break
		}
	}
	if n.firm != was && n.changed != nil {
		close(n.changed)
		n.changed = nil
	}
}

// Acked is the number below which all have been answered.
func (n *Numbers) Acked() uint64 {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.base
}

// Answered says that the kernel has the answer to a request, or wants none any more.
func (n *Numbers) Answered(request uint64) {
	request &^= resent
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.taken.Len() > 0 {
		n.taken.Delete(request)
	}
	numbers := n.requests[request]
	delete(n.requests, request)
	for _, number := range numbers {
		if n.given[number-n.base].out {
			n.finishLocked(number)
		} else { // its caller gave up, and it goes on
			g := n.open.Get(number)
			n.open.Put(number, g[0], 0, g[2])
		}
	}
	if all := n.again[request]; len(all) > 0 {
		delete(n.again, request)
		n.voidLocked(all)
	}
	delete(n.was, request)
}

// Take notes that a write that a request brings is about to be acknowledged before it is sent.
func (n *Numbers) Take(request uint64) {
	if n.e == nil || request == 0 {
		return
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	n.taken.Put(request, 1)
}

// Took reports whether a request comes again that the process before this one had taken,
// and perhaps sent, and with it lost.
func (n *Numbers) Took(request uint64) bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	return request != 0 && n.was[request]
}

// Inherit takes what the process before this one left: before anything else. void is called
// for each number that no request will ask for again, so that nothing is carried
// out under it later; End must follow. It must not call Numbers itself.
func (n *Numbers) Inherit(l *Left, void func(number uint64, a Again)) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.void, n.over = void, false
	n.again, n.was = make(map[uint64][]Again), make(map[uint64]bool)
	l.Numbers = slices.DeleteFunc(l.Numbers, func(r Record) bool { return r.Key >= l.Next || l.Next-r.Key > maxBehind })
	n.base = l.Next
	for _, r := range l.Numbers {
		n.base = min(n.base, r.Key)
	}
	n.given = make([]given, l.Next-n.base)
	for i := range n.given {
		n.given[i].answered = true
	}
	if n.e != nil {
		n.e.store(wordNext, l.Next)
	}
	slices.SortFunc(l.Numbers, func(a, b Record) int { return int(a.Key) - int(b.Key) })
	for _, r := range l.Numbers {
		n.given[r.Key-n.base].answered = false
		n.open.Put(r.Key, r.Values...)
		n.again[r.Values[1]] = append(n.again[r.Values[1]], Again{r.Key, r.Values[0], r.Values[2]})
	}
	for _, r := range l.Taken {
		n.was[r.Key] = true
		n.taken.Put(r.Key, 1)
	}
	n.firm = n.base
	n.passLocked()
	n.voidLocked(n.again[0])
	delete(n.again, 0)
}

func (n *Numbers) voidLocked(all []Again) {
	for _, a := range all {
		n.void(a.Number, a)
	}
}

// ResentAre says which requests came again: no others will.
func (n *Numbers) ResentAre(requests map[uint64]bool) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.over {
		return
	}
	n.over = true
	for request, all := range maps.All(n.again) {
		if !requests[request] {
			delete(n.again, request)
			n.voidLocked(all)
		}
	}
	for request := range n.was {
		if !requests[request] {
			delete(n.was, request)
			n.taken.Delete(request)
		}
	}
}
