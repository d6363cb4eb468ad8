package daemon

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"sync"
	"time"

	"mortar/internal/cluster"
	"mortar/internal/codec"
	"mortar/internal/crew"
	"mortar/internal/fsop"
	"mortar/internal/pki"
	"mortar/internal/proto"
	"mortar/internal/replica"
	"mortar/internal/wire"
)

// mounts are the connections of mounts, on this machine and on others.
type mounts struct {
	mu   sync.Mutex // guards the fields below
	all  map[*mountConn]struct{}
	shut bool
}

func newMounts() *mounts { return &mounts{all: map[*mountConn]struct{}{}} }

// changed sends everybody the new map of the volume he mounts.
func (s *mounts) changed() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for c := range s.all {
		c.push()
	}
}

// close lets nobody in any more.
func (s *mounts) close() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.shut = true
}

// end ends all connections; their mounts are on other machines, or go there.
func (s *mounts) end(why string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for c := range s.all {
		c.conn.Close(errors.New(why))
	}
}

// mountConn is one mount's connection. It has one session at most.
type mountConn struct {
	m       *member
	subject pki.Subject // what its certificate entitles it to
	key     cluster.ID  // that it proved to have
	owner   string      // the same, in words
	source  netip.Addr  // not valid: this machine
	conn    *wire.Conn
	ctx     context.Context
	wg      *crew.Crew // of calls being answered
	lessee  lessee

	mu       sync.Mutex // guards the fields below
	volume   string     // whose map it wants
	version  uint64     // of the map it has
	readOnly bool
	state    sessionState
	session  *replica.Session
	left     *replica.Session              // that was sent away last: what its client has cached counts until it says otherwise
	holds    []proto.Hold                  // of the next Attach; used by Message only
	cancels  map[uint64]context.CancelFunc // of calls being answered
}

type sessionState uint8

const (
	noSession sessionState = iota
	attaching
	attached
)

var (
	_ wire.Handler     = (*mountConn)(nil)
	_ wire.Canceler    = (*mountConn)(nil)
	_ replica.Sink     = (*mountConn)(nil)
	_ replica.Recaller = (*mountConn)(nil)
)

// serveMount answers one mount until its connection ends.
func (m *member) serveMount(ctx context.Context, nc net.Conn, subject pki.Subject, key cluster.ID) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	c := &mountConn{m: m, subject: subject, key: key, owner: key.String(), ctx: ctx, cancels: map[uint64]context.CancelFunc{}, wg: crew.New(answerersKept)}
	if ap, err := netip.ParseAddrPort(nc.RemoteAddr().String()); err == nil {
		c.source = ap.Addr().Unmap()
	}
	c.conn = wire.New(nc, wire.Options{Log: m.log, Handler: c})
	m.mounts.mu.Lock()
	if m.mounts.shut {
		m.mounts.mu.Unlock()
		return
	}
	m.mounts.all[c] = struct{}{}
	m.mounts.mu.Unlock()
	err := c.conn.Run(ctx)
	m.mounts.mu.Lock()
	delete(m.mounts.all, c)
	m.mounts.mu.Unlock()
	cancel() // whoever still works for it need not
	c.wg.Wait()
	if c.session != nil {
		c.session.Detach()
	}
	m.log.Debug("a mount's connection ended", "from", nc.RemoteAddr().String(), "reason", err)
}

// Message implements wire.Handler.
func (c *mountConn) Message(_ *wire.Conn, msg wire.Message) {
	if err := c.message(msg); err != nil {
		c.conn.Close(fmt.Errorf("%w: kind %d: %w", wire.ErrFrame, msg.Kind, err))
	}
}

// answerersKept is how many goroutines of a connection wait for the next call.
const answerersKept = 8

// maxHolds bounds the inodes that a session may say it holds, some 100 MiB.
const maxHolds = 4 << 20

var errOrder = errors.New("not in this order")

func (c *mountConn) message(msg wire.Message) error {
	c.mu.Lock()
	session, left := c.session, c.left
	c.mu.Unlock()
	isCall := msg.ID != 0
	switch msg.Kind {
	case proto.KindGetMap:
		var q proto.GetMap
		if err := decode(msg, isCall, &q); err != nil {
			return err
		}
		if vm := c.want(q.Volume, c.m.view.Load()); vm.Status == proto.OK {
			c.conn.Reply(msg, codec.Append(nil, vm))
			break
		}
		c.wg.Go(func() { // another peer may know better, and may be asked
			c.m.catchUp(c.ctx)
			c.conn.Reply(msg, codec.Append(nil, c.want(q.Volume, newView(c.m.latest()))))
		})
	case proto.KindHold:
		var q proto.Forget
		if err := decode(msg, !isCall, &q); err != nil {
			return err
		}
		if c.holds = append(c.holds, q.Holds...); len(c.holds) > maxHolds {
			return errors.New("more held inodes than a session may have")
		}
	case proto.KindAttach:
		q := new(proto.Attach)
		if err := decode(msg, isCall, q); err != nil {
			return err
		}
		q.Holds, c.holds = append(c.holds, q.Holds...), nil
		c.mu.Lock()
		busy := c.state != noSession
		if !busy {
			c.state = attaching
		}
		c.mu.Unlock()
		if busy {
			return errOrder
		}
		c.wg.Go(func() { c.attach(msg, q) })
	case proto.KindDo:
		if session == nil && left == nil {
			return errOrder
		}
		q := new(proto.Do)
		if err := decode(msg, isCall, q); err != nil {
			return err
		}
		if session == nil { // it crossed the word that sends the client away
			c.conn.Reply(msg, codec.Append(nil, &proto.DoReply{Status: proto.NotServing}))
			break
		}
		ctx, cancel := context.WithCancel(c.ctx)
		c.mu.Lock()
		c.cancels[msg.ID] = cancel
		c.mu.Unlock()
		c.wg.Go(func() {
			reply := c.do(ctx, session, q)
			c.mu.Lock()
			delete(c.cancels, msg.ID)
			c.mu.Unlock()
			cancel()
			if free := reply.Reply.Free; free == nil {
				c.conn.Reply(msg, encodeReply(&reply)...)
			} else if c.conn.ReplySent(c.ctx, msg, encodeReply(&reply)...) == nil {
				free()
			}
		})
	case proto.KindPing:
		var q proto.Ping
		if err := decode(msg, isCall, &q); err != nil {
			return err
		}
		pong := &proto.Pong{Stamp: q.Stamp}
		if session != nil {
			pong = session.Ping(&q)
		}
		if pong.Serving {
			if err := c.m.n.page.gives(&c.lessee, session.ID(), cluster.Outwait(time.Duration(pong.Lease))); err != nil {
				c.m.log.Warn("no lease for a mount, since nobody would know of it", "error", err)
				pong = &proto.Pong{Stamp: q.Stamp}
			}
		}
		c.conn.Reply(msg, codec.Append(nil, pong))
	case proto.KindDied:
		var q proto.Died
		if err := decode(msg, isCall, &q); err != nil {
			return err
		}
		if c.subject.Role != pki.RolePeer {
			return errors.New("no peer")
		}
		c.m.peerDied(c.key, q.Boot)
		c.conn.Reply(msg)
	case proto.KindForget:
		var q proto.Forget
		if err := decode(msg, !isCall, &q); err != nil {
			return err
		}
		if session != nil {
			session.Forget(q.Holds)
		}
	case proto.KindInvalAck:
		var q proto.InvalAck
		if err := decode(msg, !isCall, &q); err != nil {
			return err
		}
		switch {
		case session != nil:
			session.InvalAck(q.Seq)
		case left != nil:
			left.InvalAck(q.Seq)
		}
	case proto.KindLapsed:
		if isCall || len(msg.Body) > 0 {
			return errOrder
		}
		for _, s := range []*replica.Session{session, left} {
			if s != nil {
				s.Lapsed()
			}
		}
		if err := c.m.n.page.lapsed(&c.lessee); err != nil {
			c.m.log.Warn("a lease that is over still counts", "error", err)
		}
	default:
		return errors.New("unknown kind")
	}
	return nil
}

// encodeReply encodes a reply. The data of a read, which comes last, is not copied.
func encodeReply(d *proto.DoReply) [][]byte {
	data := d.Reply.Data
	if len(data) < 4096 {
		return [][]byte{codec.Append(nil, d)}
	}
	d.Reply.Data = nil
	head := codec.Append(nil, d)
	binary.LittleEndian.PutUint32(head[len(head)-4:], uint32(len(data)))
	return [][]byte{head, data}
}

// decode reads a message that must be a call, or must not.
func decode(msg wire.Message, ok bool, v codec.Coded) error {
	if !ok {
		return errors.New("a call where a message is due, or the other way round")
	}
	return codec.Decode(msg.Body, v)
}

// Cancel implements wire.Canceler.
func (c *mountConn) Cancel(_ *wire.Conn, id uint64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if cancel := c.cancels[id]; cancel != nil {
		cancel()
	}
}

// attach makes a replica on this machine the mount's home.
func (c *mountConn) attach(msg wire.Message, q *proto.Attach) {
	session, reply, readOnly := c.admit(q)
	c.mu.Lock()
	c.session, c.readOnly, c.left = session, readOnly, nil
	c.state = attached
	if session == nil {
		c.state = noSession
	}
	c.mu.Unlock()
	c.conn.Reply(msg, codec.Append(nil, &reply))
}

func (c *mountConn) admit(q *proto.Attach) (s *replica.Session, reply proto.AttachReply, readOnly bool) {
	if q.Version != proto.Version {
		return nil, proto.AttachReply{Status: proto.WrongVersion, Text: fmt.Sprintf(
			"the mount speaks protocol version %d and this daemon %d: run the same version of mortar on both", q.Version, proto.Version)}, false
	}
	v := c.m.view.Load().VolumeByID(q.Set.Volume)
	if v == nil {
		return nil, proto.AttachReply{Status: proto.UnknownSet, Text: "no such volume"}, false
	}
	readOnly = !c.subject.MayMount(v.Name, true)
	if readOnly && !c.subject.MayMount(v.Name, false) {
		return nil, proto.AttachReply{Status: proto.Refused, Text: "this client may not mount volume " + v.Name}, false
	}
	if c.subject.Role != pki.RolePeer && !v.EffectiveOptions().Access.Allows(c.source) {
		return nil, proto.AttachReply{Status: proto.Refused, Text: fmt.Sprintf(
			"option %s of volume %s does not let %s mount it", cluster.OptAuthAllow, v.Name, c.source)}, false
	}
	if v.Status != cluster.VolumeStarted {
		return nil, proto.AttachReply{Status: proto.Refused, Text: fmt.Sprintf("Volume %s is not started", v.Name)}, false
	}
	r := c.m.bricks.ofSet(q.Set)
	if r == nil {
		for i, b := range v.Bricks {
			if b.Peer == c.m.keeper.ID() && v.Sets[i/v.Replica].Set == q.Set {
				return nil, proto.AttachReply{Status: proto.NotServing, Text: fmt.Sprintf("brick %s is not open", b)}, false
			}
		}
		return nil, proto.AttachReply{Status: proto.UnknownSet, Text: "no brick of the set is on this machine"}, false
	}
	s, reply = r.Attach(c.ctx, c.owner, q, c)
	return s, reply, readOnly
}

func (c *mountConn) do(ctx context.Context, s *replica.Session, q *proto.Do) proto.DoReply {
	c.mu.Lock()
	readOnly := c.readOnly
	c.mu.Unlock()
	if k := q.Op.Kind(); readOnly && k.Mutates() && k != fsop.KindSetlk && k != fsop.KindCloseSession {
		return proto.DoReply{Errno: fsop.EROFS}
	}
	return s.Do(ctx, q)
}

// Invalidate implements replica.Sink.
func (c *mountConn) Invalidate(i *proto.Inval) error {
	return c.conn.Send(proto.KindInval, codec.Append(nil, i))
}

// Recall implements replica.Recaller.
func (c *mountConn) Recall(r *proto.Recall) error {
	return c.conn.Send(proto.KindRecall, codec.Append(nil, r))
}

// Detached implements replica.Sink. The mount may attach again on this connection.
func (c *mountConn) Detached(text string) {
	c.mu.Lock()
	if c.state == attached {
		c.state, c.session, c.left = noSession, nil, c.session
	}
	c.mu.Unlock()
	c.conn.Send(proto.KindDetached, codec.Append(nil, &proto.Detached{Text: text}))
}

// push sends the map of the mount's volume if it has changed for a mount.
func (c *mountConn) push() {
	c.mu.Lock()
	defer c.mu.Unlock()
	v := c.m.view.Load()
	if c.volume == "" || c.version >= v.Version {
		return
	}
	vm := c.volumeMap(c.volume, v)
	c.version = vm.Version
	c.conn.Send(proto.KindVolumeMap, codec.Append(nil, vm))
}

// want notes which volume is mounted, and returns its map.
func (c *mountConn) want(volume string, v *view) *proto.VolumeMap {
	c.mu.Lock()
	defer c.mu.Unlock()
	vm := c.volumeMap(volume, v)
	c.volume, c.version = volume, vm.Version
	return vm
}

// volumeMap is what a mount has to know of a volume.
func (c *mountConn) volumeMap(name string, v *view) *proto.VolumeMap {
	vm := &proto.VolumeMap{Version: v.Version}
	vol := v.Map.Volume(name)
	switch {
	case vol == nil:
		vm.Status, vm.Text = proto.UnknownSet, fmt.Sprintf("Volume %s does not exist", name)
		return vm
	case !c.subject.MayMount(name, false):
		vm.Status, vm.Text = proto.Refused, "this client may not mount volume "+name
		return vm
	case vol.Status != cluster.VolumeStarted:
		vm.Status, vm.Text = proto.Refused, fmt.Sprintf("Volume %s is not started", name)
	}
	vm.Volume = vol.ID
	for _, o := range cluster.Options() {
		if o.Scope != cluster.ScopeBrick && o.Ignored == "" {
			value, _ := vol.Option(o.Name)
			vm.Options = append(vm.Options, proto.Option{Key: o.Name, Value: value})
		}
	}
	for i, b := range vol.Bricks {
		set := &vol.Sets[i/vol.Replica]
		ba := proto.BrickAddr{Set: set.Set.Index, Brick: b.ID, Peer: b.Peer, InSync: set.IsInSync(b.ID)}
		if b.Peer == c.m.keeper.ID() {
			vm.Serves = vm.Serves || ba.InSync
			if p := v.Peer(b.Peer); p != nil {
				ba.Addrs = p.Addrs
			}
		} else {
			ba.Addrs = c.m.links.addrsOf(b.Peer)
		}
		ba.Addrs = ba.Addrs[:min(len(ba.Addrs), 16)]
		vm.Bricks = append(vm.Bricks, ba)
	}
	return vm
}

// refuseMount tells a mount why nothing is served here.
func refuseMount(ctx context.Context, nc net.Conn, why string) {
	wire.New(nc, wire.Options{Handler: wire.HandlerFunc(func(c *wire.Conn, msg wire.Message) {
		if msg.Kind != proto.KindGetMap || msg.ID == 0 {
			c.Close(errOrder)
			return
		}
		c.Reply(msg, codec.Append(nil, &proto.VolumeMap{Status: proto.UnknownSet, Text: why}))
	})}).Run(ctx)
}
