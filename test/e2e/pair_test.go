package e2e

import (
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"
)

// says waits until a command on a host prints all of the parts, whatever its status.
func (p *pool) says(i int, limit time.Duration, args string, parts ...string) {
	p.t.Helper()
	p.within(limit, fmt.Sprintf("mortar %s on n%d explains itself", args, i), func() error {
		r, _ := p.try(i, strings.Fields(args)...)
		var err error
		for _, part := range parts {
			if text := r.Stdout + r.Stderr; !strings.Contains(text, part) {
				err = errors.Join(err, fmt.Errorf("it does not say %q:\n%s", part, text))
			}
		}
		return err
	})
}

// waits starts a write on a host, which must not be answered for a while, and
// returns a function that demands that it succeeds in the end.
func (p *pool) waits(i int, name string) (done func()) {
	p.t.Helper()
	wait := p.async(i, time.Minute, "sh", "-c", "echo "+name+" > /mnt/wp/"+name)
	over := make(chan error, 1)
	go func() { over <- wait() }()
	select {
	case err := <-over:
		p.t.Fatalf("a write on n%d, without those that have the vote, was answered: %v", i, err)
	case <-time.After(2 * time.Second): // longer than any lease: what has not been answered by now waits
	}
	return func() {
		p.t.Helper()
		select {
		case err := <-over:
			if err != nil {
				p.t.Error(err)
			}
		case <-time.After(20 * time.Second):
			p.t.Fatalf("the write on n%d still waits", i)
		}
		if got := p.run(i, "cat", "/mnt/wp/"+name); got != name+"\n" {
			p.t.Errorf("n%d reads %q", i, got)
		}
	}
}

// back starts the daemon of a host that was lost.
func (p *pool) back(i int) {
	p.t.Helper()
	p.startDaemon(i)
	p.waitDaemon(i)
}

// Two machines without a witness: the first one's vote decides. Without the
// second all goes on; without the first everything waits, says why, and goes on
// when it is back; in whatever order they come.
func TestTwoMachines(t *testing.T) {
	p := start(t, setup{hosts: 2})
	quorum := []string{"n1 has the only vote of this pool of two", "mortar peer recover", "mortar server --witness"}

	l := p.startLoad("without-n2", stall)
	p.killDaemon(2)
	l.goesOn(10 * time.Second)
	p.within(10*time.Second, "n1 goes on alone", func() error {
		st, err := p.status(1)
		if s := st.Sets; err == nil && (s[0].InSync != 1 || !s[0].Writable) {
			err = fmt.Errorf("%+v", s[0])
		}
		return err
	})
	p.back(2)
	p.healed(1, 30*time.Second)
	l.end()
	l.check(1, 2)

	for _, leads := range pick([]int{2}, []int{1, 2}) { // with n2 as primary it is harder
		for p.primary(1) != leads {
			p.killDaemon(p.other(leads))
			p.within(10*time.Second, "the other brick leads", func() error {
				if leads == 2 {
					return nil // n2 cannot be made to lead without n1's vote
				}
				st, err := p.status(1)
				if err == nil && st.Sets[0].Primary != "n1:"+brickDir {
					err = fmt.Errorf("primary %q", st.Sets[0].Primary)
				}
				return err
			})
			p.back(p.other(leads))
			p.healed(1, 30*time.Second)
			if leads == 2 {
				break
			}
		}
		p.killDaemon(1)
		done := p.waits(2, fmt.Sprintf("without-n1-%d", leads))
		p.says(2, 5*time.Second, "peer status", quorum...)
		p.says(2, 5*time.Second, "volume status wp", "no quorum (1 of its 1 voting peers", "n1:"+brickDir, "reads and writes wait")
		p.refuse(2, []string{"volume", "set", "wp", "cache-timeout", "30"}, "Quorum not met", "1 of its 1 voting peer(s) (n1)")
		p.refuse(2, []string{"volume", "recover", "wp", "accept-loss"}, "no quorum", "mortar peer recover")
		p.back(1)
		done()
		p.healed(1, 30*time.Second)
	}

	for _, first := range pick([]int{2}, []int{1, 2}) {
		name := fmt.Sprintf("both-%d", first)
		l := p.startLoad(name, 30*time.Second, "-fsync")
		p.killDaemon(1)
		p.killDaemon(2)
		p.back(first)
		if first == 2 {
			p.says(2, 10*time.Second, "peer status", quorum...)
		}
		p.back(p.other(first))
		l.goesOn(15 * time.Second)
		p.healed(1, 30*time.Second)
		l.end()
		l.check(1, 2)
	}
}

// With a witness either of the two may be lost, or the witness; two of the three
// are one too many, and that is said.
func TestWitness(t *testing.T) {
	p := start(t, setup{hosts: 3, replica: 2, mounts: 2, witness: 3})
	p.refuse(1, []string{"volume", "create", "more", "n3:/bricks/more"}, "Host n3 is a witness", "holds no bricks")
	for _, lost := range pick([]int{1}, []int{2, 1, 3}) {
		writer := p.other(lost)
		l := p.startLoadOn(writer, fmt.Sprintf("lost-%d", lost), stall)
		p.killDaemon(lost)
		l.goesOn(10 * time.Second)
		p.back(lost)
		p.healed(writer, 30*time.Second)
		l.end()
		l.check(1, 2)
	}
	// The witness goes, and nobody minds; then one of the two is one too many.
	p.killDaemon(3)
	p.killDaemon(2)
	done := p.waits(1, "two-lost")
	p.says(1, 5*time.Second, "peer status", "2 of its 3 voting peers are needed", "n2, n3 cannot be reached", "mortar peer recover")
	p.says(1, 5*time.Second, "volume status wp", "no quorum (2 of its 3 voting peers", "n2:"+brickDir)
	p.back(3) // a vote is all that was missing
	done()
	p.back(2)
	p.healed(1, 30*time.Second)

	// All three die, and come back in every order; with two of them the volume goes on, whichever they are.
	for _, order := range pick([][]int{{3, 2, 1}}, [][]int{{3, 2, 1}, {3, 1, 2}, {2, 3, 1}, {2, 1, 3}, {1, 3, 2}, {1, 2, 3}}) {
		l := p.startLoad("order"+strings.Trim(strings.ReplaceAll(fmt.Sprint(order), " ", "-"), "[]"), 40*time.Second, "-fsync")
		for i := 1; i <= 3; i++ {
			p.killDaemon(i)
		}
		for n, i := range order {
			p.back(i)
			if n == 1 {
				l.goesOn(20 * time.Second)
			}
		}
		p.healed(1, 30*time.Second)
		l.goesOn(10 * time.Second)
		l.end()
		l.check(1, 2)
	}
}

// The machine that has everything is lost for good. Nothing is given up by
// itself; an operator accepts the loss, and the machine, when it returns after
// all, takes over what was decided.
func TestRecovery(t *testing.T) {
	p := start(t, setup{replica: 3, options: []string{"min-in-sync", "1"}})
	last := p.leadElsewhereThan(1) // it alone will have everything
	stays, away := p.other(last), p.other(last, p.other(last))
	p.run(stays, "sh", "-c", "echo old > /mnt/wp/old; sync /mnt/wp/old")
	p.killDaemon(stays)
	p.within(10*time.Second, "the others go on", func() error {
		st, err := p.status(last)
		if err == nil && st.Sets[0].InSync != 2 {
			err = fmt.Errorf("%+v", st.Sets[0])
		}
		return err
	})
	p.run(away, "sh", "-c", "echo new > /mnt/wp/new; sync /mnt/wp/new")
	// The two that have it go, for good as it seems, and with them the quorum.
	p.killDaemon(last)
	p.killDaemon(away)
	p.back(stays)
	p.says(stays, 10*time.Second, "peer status", "2 of its 3 voting peers are needed", "mortar peer recover")
	p.refuse(stays, []string{"--mode=script", "peer", "recover"}, "only voter", "nothing was done", "accept-loss")
	p.mortar(stays, "peer", "recover", "accept-loss")
	p.says(stays, 10*time.Second, "volume status wp", "may not know which bricks have every change", fmt.Sprintf("n%d:%s does not answer", last, brickDir), "mortar volume recover wp")
	p.refuse(stays, []string{"--mode=script", "volume", "recover", "wp"}, "LOST", fmt.Sprintf("n%d:%s was in sync", last, brickDir), fmt.Sprintf("n%d:%s was in sync", away, brickDir), "nothing was done")
	p.mortar(stays, "volume", "recover", "wp", "accept-loss")
	p.within(10*time.Second, "the volume serves what is left", func() error {
		_, err := p.Host(stays).Run(p.ctx(patience), "sh", "-c", "test old = $(cat /mnt/wp/old) && echo after > /mnt/wp/after")
		return err
	})
	p.says(stays, time.Second, "volume info wp", fmt.Sprintf("on n%d: set 0 went on with n%d:%s", stays, stays, brickDir))
	for _, i := range []int{last, away} {
		p.startDaemon(i)
		p.says(i, 20*time.Second, "peer status", "recovered by hand while this peer was away", "mortar peer recover")
		p.mortar(i, "peer", "recover", "accept-loss")
	}
	p.healed(stays, 30*time.Second)
	p.identical(stays)
	for i := 1; i <= 3; i++ {
		if got := p.run(i, "sh", "-c", "cd /mnt/wp && ls && cat after"); got != "after\nold\nafter\n" {
			t.Errorf("n%d sees %q", i, got)
		}
	}
	// And the pool is as strong as before.
	p.within(20*time.Second, "three vote again", func() error {
		if out := p.mortar(stays, "pool", "list", "--json"); strings.Count(out, `"voter": true`) != 3 {
			return fmt.Errorf("%s", out)
		}
		return nil
	})
}
