package sim

import (
	"bytes"
	"encoding/json"
	"flag"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"
)

var simMutants = flag.String("sim.mutants", "", "a regular expression: build the program without the guards of that name, and see the simulator find out")

// mutant is the program without one of its guards.
type mutant struct {
	name     string // what it does wrong
	file     string // below internal
	old, new string
	// test is the package below internal and the test that fails instead, if a minute of seeds does not:
	// doc/simulation.md says why.
	test string
}

// The guards that the invariants rest on, each with what is left when it is
// taken out. Those in sim itself stand for lines of the shell that is modelled.
var mutants = []mutant{
	// One primary per epoch; nothing of an older epoch.
	{"1 a former life's epoch is led again", "replica/core/core.go", "m.past >= m.cfg.Epoch || !chosen", "!chosen", ""},
	{"1 an epoch older than a former life's is followed", "replica/core/core.go", "|| cfg.Epoch < m.past {", "{", "replica/core TestOlderThanPromised"},
	{"1 a sealed brick goes on accepting", "replica/core/core.go", "	m.sealed = max(m.sealed, s.Epoch)\n	m.retire()\n", "", ""},
	{"1 a backup accepts what is not of its epoch", "replica/core/backup.go", "epoch != m.cfg.Epoch || ", "", "replica/core TestOfThisEpochAndRound"},
	{"1 a primary counts answers of other epochs", "replica/core/primary.go", "m.role != Primary || epoch != m.cfg.Epoch", "m.role != Primary", "replica/core TestOfThisEpochAndRound"},
	{"1 the control plane decides an epoch twice", "control/state/apply.go", "if next.Epoch != old.Epoch+1 {", "if next.Epoch < old.Epoch {", "control/state TestApplyScripts"},
	// What is acknowledged is on every in-sync brick.
	{"2 a primary waits for one backup less", "replica/core/primary.go", "for _, b := range m.required() {\n		p := m.progress[b]\n		if", "for _, b := range m.required()[min(1, len(m.required())):] {\n		p := m.progress[b]\n		if", ""},
	{"2 a brick that is being added does not count yet", "replica/core/core.go", "!m.adding.IsZero() && !slices", "false && !slices", ""},
	{"2 a backup acknowledges what another epoch left in its log", "replica/core/backup.go", " || !m.fits {", " {", "replica/core TestNoAckBeforeTheLogsMeet"},
	{"2 answers of an older round count", "replica/core/primary.go", " || round != p.round {", " {", "replica/core TestOfThisEpochAndRound"},
	{"2 entries of an older round are taken", "replica/core/backup.go", " || a.Round != m.round || !m.whole", " || !m.whole", "replica/core TestOfThisEpochAndRound"},
	{"2 a brick in the in-sync set before it has what it missed", "replica/core/primary.go", "!m.silent(now, p) && p.acked >= p.joined &&\n			p.acked+joinLag >= m.tail.Seq && p.ackAt > 0", "!m.silent(now, p)", "replica/core TestNotWaitedForWhileFar"},
	// Who becomes primary.
	{"3 a brick leads that was not chosen in this life", "replica/core/core.go", " || !chosen:", " || !chosen && false:", ""},
	{"3 one that lacks something leads though nobody chose it", "replica/core/core.go", "m.cfg.Chosen == m.cfg.Epoch && ", "", ""},
	{"3 who restarted is believed to have everything", "control/state/failover.go", "case r.Reply.Trusted && r.Reply.Tail.Compare(cfg.Floor) >= 0:", "default:\n		}\n		switch {\n		case !r.Reply.Sealed || id == f.Leaving || r.Reply.Unfit:\n		case true:", ""},
	{"3 not the highest position leads", "control/state/failover.go", "r.Reply.Tail.Compare(best.Reply.Tail) > 0", "r.Reply.Tail.Compare(best.Reply.Tail) < 0", "control/state TestFailoverScripts"},
	{"3 the floor is not asked for", "control/state/failover.go", "if best.Reply.Tail.Compare(cfg.Floor) < 0 {", "if false {", "control/state TestFailoverScripts"},
	{"3 a brick that is not sealed may lead", "control/state/failover.go", "case !r.Reply.Sealed:\n			if", "case false:\n			if", "control/state TestFailoverScripts"},
	{"3 a brick that was not in sync may lead", "control/state/apply.go", "if !old.IsInSync(next.Primary) {", "if false {", "control/state TestApplyScripts"},
	{"3 an unclean stop counts as clean", "sim/brick.go", "d.st.pos == d.tail() && b.m.Trusted()", "d.st.pos == d.tail()", ""},
	// Leases.
	{"4 a new primary does not outwait leases", "replica/core/core.go", "				m.holdUntil = granted\n", "", ""},
	{"4 a primary does not outwait whom it drops", "replica/core/core.go", "m.holdUntil = max(m.holdUntil, p.grantedUntil)", "_ = p", ""},
	{"4 a primary commits after its lease", "replica/core/primary.go", " || now >= m.primaryLease() {\n\t\treturn", " {\n\t\treturn", ""},
	{"4 leases of the former primary's are forgotten", "replica/core/core.go", "			p.grantedUntil = granted\n", "", ""},
	{"4 a release counts for everybody's lease", "replica/core/core.go", "return b != old.Primary && !m.cfg.IsInSync(b)", "return false", "replica/core TestReleaseIsThePrimarysOwn"},
	{"4 anybody's release counts for the primary's", "replica/core/backup.go", " && from == m.heirTo:", ":", "replica/core TestReleaseIsThePrimarysOwn"},
	{"4 leases are as long for those who gave them", "cluster/set.go", "LeaseGuard = Lease + Lease/100", "LeaseGuard = Lease - Lease/100", ""},
	{"5 reads without a lease", "replica/core/core.go", "return until, now < until", "return until, true", ""},
	{"5 a backup's lease outlives the primary's", "replica/core/primary.go", "end := min(p.ackAt+cluster.Lease, m.primaryLease())", "end := p.ackAt + cluster.Lease", ""},
	{"5 a lease for a brick that is not in sync", "replica/core/primary.go", "return m.cfg.IsInSync(b) && p.state == Streaming && p.acked >= p.joined", "return m.cfg.IsInSync(b)", "replica/core TestNoLeaseBeforeItHasAll"},
	{"5 a lease on a former life's stamp", "replica/core/primary.go", "p.ackStamp, p.ackAt = 0, 0", "_ = p", "replica/core TestStampOfAFormerLife"},
	{"5 changes are acknowledged before caches are clear", "replica/core/primary.go", "	seq := m.clear\n", "	seq := m.tail.Seq\n", ""},
	{"5 a former life's clients are forgotten", "replica/core/core.go", "if m.clear >= m.own || now < m.former {", "if m.clear >= m.own {", ""},
	{"5 a hand-over forgets the clients' caches", "replica/core/leave.go", "	if !cached {\n", "	{\n", "replica/core TestLeave"},
	{"4 a primary leaves before who it dropped has no lease", "replica/core/leave.go", "if now < m.holdUntil {", "if false {", ""},
	{"4 a primary forgets its leases in an epoch without one", "replica/core/core.go", "m.gave = max(m.gave, p.grantedUntil)", "_ = p", ""},
	// Certified death.
	{"4 a death counts against a later life", "sim/death.go", "if b.let[o.i] == life {", "{", ""},
	{"4 the clients of the dead one are forgotten", "sim/death.go", "last = max(last, end)", "_ = end", ""},
	{"4 the clients of a dead one's former lives are forgotten", "sim/death.go", "last := p.former", "last := time.Duration(0)", ""},
	{"4 what a dead primary had sent counts", "replica/core/backup.go", "max(m.sealed, m.bereft)", "m.sealed", "replica/core TestPrimaryDied"},
	{"4 what a dead backup had sent counts", "replica/core/death.go", "		if p.connected {\n			// Perhaps to its next life already. In a new round nothing counts that the dead one said.\n			m.probe(now, b)\n		}\n", "", "replica/core TestBackupDiedAndWasSlow"},
	{"4 bricks that a dead primary had dropped are forgotten", "replica/core/core.go", "				m.holdUntil = m.afterHeir\n", "", "replica/core TestDeadPrimaryHadDropped"},
	{"4 a process that was only stopped is called dead", "sim/brick.go", "	b.paused = true\n	life := b.life\n", "	b.paused = true\n	life := b.life\n	b.w.watch(b, &page{life: life, guarded: true})\n", ""},
	{"4 a death is held against a life that was not heard yet", "replica/core/death.go", "		if m.met != m.cfg.Epoch {\n			return // it may be the next life that leads, of which nothing has come yet\n		}\n", "", ""},
	{"I6 a brick joins with a log that is not flushed", "replica/core/primary.go", "	if p.durable >= seq {\n", "	{\n", ""},
	{"5 an attach that was overtaken takes the newer one's place", "sim/session.go", "if old != nil && a.gen < old.gen {", "if false {", ""},
	{"5 reads do not wait for commit", "sim/session.go", "if r.dep > commit {", "if r.dep > commit && false {", ""},
	// Coming back.
	{"6 logs are compared by sequence alone", "replica/core/backup.go", "case a.Prev == m.tail && m.loaded:", "case a.Prev.Seq == m.tail.Seq && m.loaded:", "replica/core TestLogsMeetAtPositions"},
	{"6 a brick that is not whole leads", "replica/core/core.go", "case !m.whole || m.past", "case m.past", ""},
	{"6 a compared brick takes all for committed", "replica/core/core.go", "	m.commit, m.acked = 0, 0\n", "	m.commit = max(m.commit, pos.Seq)\n", ""},
	{"6 a backup takes for committed what it is to undo", "replica/core/backup.go", "m.seeCommit(min(a.Commit, a.Prev.Seq))", "m.seeCommit(a.Commit)", ""},
	{"6 a brick without contents keeps its set waiting", "replica/core/core.go", "		r.Unfit = true\n", "", ""},
	// The rest.
	{"7 acknowledgements go on below min-in-sync", "replica/core/primary.go", "	if m.cfg.Writable() {\n", "	{\n", ""},
	{"8 a change that was carried out is refused", "sim/request.go", "switch seq := b.disk.st.answered(q.c.i, q.number); {", "switch seq := uint64(0); {", ""},
	{"8 what a former home forwards is carried out late", "sim/request.go", "if q.epoch != b.m.Config().Epoch || q.turn < b.turns[q.c.i] {", "if false {", ""},
	{"8 a home asks in an epoch that its client does not know", "sim/request.go", "	q := *a.q\n", "	q := *a.q\n	q.epoch = b.m.Config().Epoch\n", ""},
	{"8 a client goes to a home that is behind", "sim/client.go", "if epoch < c.epoch {", "if false {", ""},
	{"8 what had no room is carried out later", "sim/request.go", "	if b.refusedBefore(q) {\n", "	if false {\n", ""},
	{"8 a copy of what was answered is carried out", "sim/request.go", "q.number < b.below[q.c.i] || ", "", ""},
	{"8 a change that is sent again is carried out again", "sim/request.go", "if !b.disk.st.executed(&e) {", "{", ""},
	{"I6 fsync does not wait for the backups", "sim/request.go", "low = min(low, b.durable[b.w.brick(id).i])", "_ = id", ""},
	{"drain: a drained brick is taken in", "replica/core/primary.go", "if m.cfg.IsDrained(b) {", "if false {", ""},
	{"drain: a drained brick does not leave", "replica/core/core.go", "		m.out.Leave = true\n", "", ""},
	{"drain: what was to leave stays closed", "replica/core/leave.go", "{ m.leaving, m.closed = false, false }", "{ m.leaving = false }", "replica/core TestStay"},
	{"live: a backup whose disk hangs stays", "replica/core/primary.go", "return p.mute(now) || m.slow(now, p, stuckAfter)", "return p.mute(now)", ""},
	{"live: a primary whose disk hangs stays", "replica/core/core.go", " || m.Slow(now) {", " {", ""},
	{"live: a primary whose disk hangs takes back what it hands over", "sim/brick.go", " || b.m.Slow(b.now())", "", ""},
	{"live: a proposal in doubt stays in doubt", "replica/core/primary.go", "return m.silent(now, p) || m.slowToJoin(now, p)", "return false", ""},
	{"live: how long a sync waited in an earlier epoch is a measure", "replica/core/lag.go", "max(came, l.began)", "came", ""},
	{"7 a brick whose disk hangs is dropped though the set needs it", "replica/core/primary.go", "(m.cfg.Spares() > 0 || m.progress[m.adding] == p)", "true", "replica/core TestLagsAndIsNeeded"},
	{"live: a lost acknowledgement is not repeated", "replica/core/primary.go", "	m.hasUpTo(now, from, p, a.Acked)\n", "", "replica/core TestAcknowledgedAgain"},
}

// TestMutants shows that the simulator would find the guards missing. It takes
// a minute for each that it does not find, so it runs only when asked for.
func TestMutants(t *testing.T) {
	if *simMutants == "" {
		t.Skip("no -sim.mutants")
	}
	which, err := regexp.Compile(*simMutants)
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range mutants {
		if which.MatchString(m.name) {
			t.Run(m.name, m.run)
		}
	}
}

// TestMutantsFit checks that every guard is where the list says.
func TestMutantsFit(t *testing.T) {
	for _, m := range mutants {
		if n := strings.Count(source(t, m.file), m.old); n != 1 {
			t.Errorf("%s: what is to be taken out is in %s %d times", m.name, m.file, n)
		}
	}
}

func source(t *testing.T, file string) string {
	t.Helper()
	b, err := os.ReadFile(filepath.Join("..", file))
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func (m *mutant) run(t *testing.T) {
	dir := t.TempDir()
	overlay := m.overlay(t, dir)
	if pkg, test, is := strings.Cut(m.test, " "); is {
		out, err := exec.CommandContext(t.Context(), "go", "test", "-vet=off", "-overlay", overlay, "-run", "^"+test+"$", "../"+pkg).CombinedOutput()
		if err == nil || !bytes.Contains(out, []byte("--- FAIL: "+test)) {
			t.Errorf("%s does not notice: %v\n%s", m.test, err, out)
		}
		return
	}
	bin := filepath.Join(dir, "sim.test")
	build := exec.CommandContext(t.Context(), "go", "test", "-c", "-vet=off", "-overlay", overlay, "-o", bin, ".")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("it does not build: %v\n%s", err, out)
	}
	long := 60 * time.Second
	if *simFor != 0 {
		long = *simFor
	}
	began := time.Now()
	// What was found once is known first: some of it a minute of seeds does not show.
	out, err := exec.CommandContext(t.Context(), bin, "-test.run=^TestFound$").CombinedOutput()
	if err == nil {
		out, err = exec.CommandContext(t.Context(), bin, "-test.run=^TestSeeds$", "-test.v", "-sim.for="+long.String(), "-sim.first=1", "-sim.asis").CombinedOutput()
	}
	took := time.Since(began)
	if err == nil {
		t.Errorf("not found in %v:\n%s", took.Round(time.Second), out)
		return
	}
	for line := range strings.Lines(string(out)) {
		if strings.Contains(line, ": seed ") || strings.Contains(line, ".txt: ") {
			t.Logf("%s", strings.TrimSpace(line))
			break
		}
	}
}

// overlay writes the changed file, and what tells the go command to take it.
func (m *mutant) overlay(t *testing.T, dir string) string {
	t.Helper()
	if n := strings.Count(source(t, m.file), m.old); n != 1 {
		t.Fatalf("what is to be taken out is in %s %d times", m.file, n)
	}
	path, err := filepath.Abs(filepath.Join("..", m.file))
	if err != nil {
		t.Fatal(err)
	}
	changed, overlay := filepath.Join(dir, "changed.go"), filepath.Join(dir, "overlay.json")
	if err := os.WriteFile(changed, []byte(strings.Replace(source(t, m.file), m.old, m.new, 1)), 0o600); err != nil {
		t.Fatal(err)
	}
	b, err := json.Marshal(map[string]any{"Replace": map[string]string{path: changed}})
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(overlay, b, 0o600); err != nil {
		t.Fatal(err)
	}
	return overlay
}
