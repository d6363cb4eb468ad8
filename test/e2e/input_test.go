package e2e

import (
	"bytes"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"mortar/test/cluster"
)

// Everything wrong that a user can say: a clear message that names the thing
// and the remedy, and nothing else harmed.
func TestBadCommands(t *testing.T) {
	p := start(t, setup{replica: 2, mounts: 1})
	p.run(1, "sh", "-c", "echo before > /mnt/wp/file")
	before := p.mortar(1, "volume", "info")
	p.run(1, "sh", "-ec", "mkdir -p /bricks/taken; echo mine > /bricks/taken/file; echo x > /bricks/plain; mkdir -p /srv/root")
	for _, c := range []struct {
		args string
		want []string // parts of the message
	}{
		{"volume create new n1:relative", []string{"Wrong brick type: n1:relative, use <HOSTNAME>:<export-dir-abs-path>"}},
		{"volume create new replica 1 n1:/bricks/x", []string{"replica count should be greater than 1"}},
		{"volume create new replica two n1:/bricks/x", []string{"replica count should be greater than 1"}},
		{"volume create new replica 3 n1:/bricks/x n2:/bricks/x", []string{"number of bricks is not a multiple of replica count"}},
		{"volume create new replica 6 n1:/bricks/x n2:/bricks/x n3:/bricks/x n1:/bricks/y n2:/bricks/y n3:/bricks/y force", []string{"6", "5"}},
		{"volume create new n1:/bricks/x n2:/bricks/x", []string{"set"}},
		{"volume create new replica 2 n1:/bricks/x n1:/bricks/x", []string{"Found duplicate exports n1:/bricks/x"}},
		{"volume create new replica 2 n1:/bricks/x n1:/bricks/y", []string{"Multiple bricks of a replicate volume are present on the same server"}},
		{"volume create new replica 2 n1:/bricks/x n9:/bricks/x", []string{"n9"}},
		{"volume create new localhost:/bricks/x", []string{"Please provide a valid hostname/ip other than localhost"}},
		{"volume create new n3:/bricks", []string{"The brick n3:/bricks is a mount point. Please create a sub-directory under the mount point"}},
		{"volume create new n1:/srv/root", []string{"The brick n1:/srv/root is being created in the root partition."}},
		{"volume create new n1:/bricks/plain", []string{"/bricks/plain", "is not a directory"}},
		{"volume create new n1:" + brickDir, []string{brickDir + " is already part of a volume"}},
		{"volume create new n1:" + brickDir + " force", []string{brickDir + " is already part of a volume"}},
		{"volume create new n1:" + brickDir + "/inside", []string{"Brick: n1:" + brickDir + "/inside not available. Brick may be containing or be contained by an existing brick."}},
		{"volume create new n1:/bricks", []string{"Brick: n1:/bricks not available."}},
		{"volume create wp n1:/bricks/x", []string{"Volume wp already exists"}},
		{"volume create w/p n1:/bricks/x", []string{`Volume name should not contain "/" character.`}},
		{"volume create all n1:/bricks/x", []string{`"all" cannot be the name of a volume.`}},
		{"volume create " + strings.Repeat("v", 256) + " n1:/bricks/x", []string{"255"}},
		{"volume create new stripe 2 n1:/bricks/x n2:/bricks/x", []string{"stripe is not supported"}},
		{"volume create new disperse 3 n1:/bricks/x n2:/bricks/x n3:/bricks/x", []string{"disperse is not supported"}},
		{"volume create new replica 2 arbiter 1 n1:/bricks/x n2:/bricks/x n3:/bricks/x", []string{"arbiter"}},
		{"volume create new replica 2 transport rdma n1:/bricks/x n2:/bricks/x", []string{"rdma"}},
		{"volume start nothing", []string{"Volume nothing does not exist"}},
		{"volume start wp", []string{"Volume wp already started"}},
		{"volume stop nothing --mode=script", []string{"Volume nothing does not exist"}},
		{"volume delete wp --mode=script", []string{"Volume wp has been started.Volume needs to be stopped before deletion."}},
		{"volume info nothing", []string{"Volume nothing does not exist"}},
		{"volume status nothing", []string{"Volume nothing does not exist"}},
		{"volume set wp cache-timeoutt 5", []string{"option : cache-timeoutt does not exist", "Did you mean cache-timeout?"}},
		{"volume set wp cache-timeout soon", []string{"cache-timeout", "soon"}},
		{"volume set wp transport.encryption maybe", []string{"transport.encryption", "maybe"}},
		{"volume set wp min-in-sync 3", []string{"min-in-sync"}},
		{"volume set nothing cache-timeout 5", []string{"Volume nothing does not exist"}},
		{"volume get wp nothing", []string{"nothing"}},
		{"volume heal nothing info", []string{"Volume nothing does not exist"}},
		{"volume heal wp split-brain", []string{"split-brain"}},
		{"volume heal wp info wrong", []string{"Usage"}},
		{"volume creat", []string{"Usage"}},
		{"volume fly wp", []string{"unrecognized"}},
		{"peer probe 256.256.256.256", []string{"256.256.256.256"}},
		{"peer probe no-such-host", []string{"no-such-host"}},
		{"peer probe 10.77.0.99", []string{"10.77.0.99", "24007"}},
		{"peer detach n2 --mode=script", []string{"Peer n2 hosts one or more bricks"}},
		{"peer detach n9 --mode=script", []string{"n9 is not part of cluster"}},
		{"peer detach n1 --mode=script", []string{"n1 is localhost"}},
		{"join nonsense n2", []string{"token"}},
		{"mount n1:/wp", []string{"Usage"}},
		{"mount n1:/nothing /mnt", []string{"Volume nothing does not exist"}},
		{"mount n1:/wp /", []string{"/"}},
		{"mount n1:/wp /bricks/plain", []string{"/bricks/plain", "directory"}},
		{"mount n1:/wp/no/such/dir /mnt", []string{"no/such/dir"}},
		{"--mode=loud volume list", []string{"--mode=loud"}},
		{"--xml volume list", []string{"--json"}},
		{"brick ls /bricks/taken", []string{"/bricks/taken", "brick.json"}},
		{"brick cat " + brickDir + " /file", []string{"daemon"}},
	} {
		t.Run(c.args, func(t *testing.T) {
			p.as(t)
			p.refuse(1, strings.Fields(c.args), c.want...)
		})
	}
	if after := p.mortar(1, "volume", "info"); after != before {
		t.Errorf("volume info before\n%safter\n%s", before, after)
	}
	if got := p.mortar(1, "volume", "list"); got != "wp\n" {
		t.Errorf("volumes: %q", got)
	}
	if got := p.run(1, "sh", "-c", "cat /mnt/wp/file /bricks/taken/file; ls /bricks | tr '\\n' ' '"); got != "before\nmine\nplain taken wp " {
		t.Errorf("afterwards: %q", got)
	}
	if got := p.run(2, "sh", "-c", "ls /bricks"); got != "wp\n" {
		t.Errorf("n2's disk: %q", got)
	}
}

// Commands where there is no daemon, and daemons that must not start.
func TestBadServers(t *testing.T) {
	p := start(t, setup{hosts: 2, alone: true})
	p.daemons[1].Signal(syscall.SIGTERM)
	<-p.daemons[1].Done()
	p.refuse(2, []string{"volume", "list"}, "Connection failed. Please check if the mortar daemon is operational.", "mortar server")
	for name, c := range map[string]struct {
		setup string
		args  []string
		want  []string
	}{
		"unknown key of the config file": {"mkdir -p /etc/mortar; echo 'adress = \":24007\"' > /etc/mortar/mortar.toml", nil, []string{"/etc/mortar/mortar.toml", "adress"}},
		"config file that is none":       {"echo '[[[' > /etc/mortar/mortar.toml", nil, []string{"/etc/mortar/mortar.toml"}},
		"unknown flag":                   {"rm -f /etc/mortar/mortar.toml", []string{"--fast"}, []string{"--fast"}},
		"impossible address":             {"rm -f /etc/mortar/mortar.toml", []string{"--listen", "24007"}, []string{"24007"}},
		"state dir that is a file":       {"echo x > /run/file", []string{"--state-dir", "/run/file"}, []string{"/run/file"}},
	} {
		t.Run(name, func(t *testing.T) {
			p.as(t)
			p.run(2, "sh", "-c", c.setup)
			argv := append([]string{mortar, "server"}, c.args...)
			r, err := p.Host(2).Run(p.ctx(10*time.Second), argv...)
			if err == nil {
				t.Fatal("the daemon ran")
			}
			for _, part := range c.want {
				if !strings.Contains(r.Stdout+r.Stderr, part) {
					t.Errorf("the message lacks %q: %v", part, err)
				}
			}
		})
	}
	p.run(2, "rm", "-f", "/etc/mortar/mortar.toml")
	// Two daemons of one directory, or of one port.
	r, err := p.Host(1).Run(p.ctx(10*time.Second), mortar, "server", "--name", "n1")
	if err == nil || !strings.Contains(r.Stderr+r.Stdout, "/var/lib/mortar") {
		t.Errorf("a second daemon: %v", err)
	}
	r, err = p.Host(1).Run(p.ctx(10*time.Second), mortar, "server", "--name", "n1", "--state-dir", "/run/other", "--run-dir", "/run/other")
	if err == nil || !strings.Contains(r.Stderr+r.Stdout, "24007") {
		t.Errorf("a second daemon on one port: %v", err)
	}
	// A key that others could read is not used.
	p.daemons[0].Signal(syscall.SIGTERM)
	<-p.daemons[0].Done()
	p.run(1, "sh", "-c", "chmod -R go+r /var/lib/mortar")
	r, err = p.Host(1).Run(p.ctx(10*time.Second), mortar, "server", "--name", "n1")
	if err == nil || !strings.Contains(r.Stderr+r.Stdout, "/var/lib/mortar") {
		t.Errorf("a key that is readable for all: %v", err)
	}
	p.run(1, "sh", "-c", "chmod -R go-r /var/lib/mortar")
	p.startDaemon(1)
	p.startDaemon(2)
	p.waitDaemon(1)
	p.waitDaemon(2)
}

// Tokens are used once, in their time, and as they were given.
func TestTokens(t *testing.T) {
	p := start(t, setup{hosts: 4, alone: true})
	invite := func(flags ...string) string {
		var inv struct{ Token string }
		p.json(&inv, 1, append([]string{"peer", "invite", "--json"}, flags...)...)
		return inv.Token
	}
	token := invite()
	p.refuse(2, []string{"join", token[:len(token)-1], "n1"}, "token")
	last := map[bool]string{true: "B", false: "A"}[strings.HasSuffix(token, "A")]
	p.refuse(2, []string{"join", token[:len(token)-1] + last, "n1"}, "token")
	p.refuse(2, []string{"join", token, "n9"}, "n9")
	p.refuse(2, []string{"join", token, "10.77.0.99"}, "10.77.0.99", "24007")
	p.refuse(2, []string{"join", token, "n3"}, p.Host(3).Addr+":24007") // another pool, another CA
	p.mortar(2, "join", token, "n1")
	p.refuse(3, []string{"join", token, "n1"}, "token")
	short := invite("--ttl", "1s")
	time.Sleep(1500 * time.Millisecond) // the token's time is the test's subject
	p.refuse(3, []string{"join", short, "n1"}, "expired")
	p.try(2, "join", invite(), "n1") // whatever it says to one that is in already
	p.within(10*time.Second, "n1 and n2 are connected, after a second join", func() error {
		if list := p.mortar(1, "pool", "list"); strings.Count(list, "Connected") != 2 || strings.Count(list, "\n") != 3 {
			return fmt.Errorf("%s", list)
		}
		return nil
	})

	// A pool with a volume does not melt into another.
	p.run(3, "mkdir", "-p", "/bricks")
	p.mortar(3, "volume", "create", "own", "n3:/bricks/own")
	p.refuse(3, []string{"join", invite(), "n1"}, "n3")
	p.refuse(1, []string{"peer", "probe", "n3"}, "n3")
	if got := p.mortar(3, "volume", "list"); got != "own\n" {
		t.Errorf("n3's volumes: %q", got)
	}
	// Somebody else's pool is not spoken to, whatever it asks.
	var status struct{ Peers []struct{ Name string } }
	p.json(&status, 1, "pool", "list", "--json")
	if len(status.Peers) != 2 {
		t.Errorf("the pool is %+v", status)
	}
	// Both directions are checked: who joins must be reachable too.
	if err := p.Host(4).Part(p.Host(2)); err != nil {
		t.Fatal(err)
	}
	p.mortar(4, "join", invite(), "n1") // n1, which it joins through, reaches it
	if err := p.MendNetwork(); err != nil {
		t.Fatal(err)
	}
	p.mortar(1, "peer", "detach", "n4", "--mode=script")
	p.within(10*time.Second, "n4 is gone", func() error {
		if out := p.mortar(2, "pool", "list"); strings.Contains(out, "n4") {
			return fmt.Errorf("%s", out)
		}
		return nil
	})
}

// A disk that was cloned, with the machine's identity on it, is found out.
func TestClonedMachine(t *testing.T) {
	p := start(t, setup{hosts: 4, replica: -1, mounts: -1})
	// 1: a file changed meanwhile; the daemon runs, as it does when a machine is cloned.
	p.run(2, "sh", "-c", "tar -C /var/lib/mortar -cf "+p.Dir+"/clone.tar . || test $? = 1")
	d := p.daemons[3]
	d.Signal(syscall.SIGTERM)
	<-d.Done()
	p.run(4, "sh", "-c", "rm -rf /var/lib/mortar/*; tar -C /var/lib/mortar -xf "+p.Dir+"/clone.tar")
	p.startDaemon(4)
	p.within(20*time.Second, "the clone is told so", func() error {
		log := p.Host(4).Log("mortar") + p.Host(2).Log("mortar")
		out, _ := p.try(1, "peer", "status")
		if text := log + out.Stdout + out.Stderr; !strings.Contains(text, "has the same identity") || !strings.Contains(text, "--new-identity") {
			return fmt.Errorf("nobody speaks of two machines with one identity, or says what to do")
		}
		return nil
	})
	p.mortar(1, "volume", "create", "wp", "n1:/bricks/wp") // the pool works
}

// The disk is full: ENOSPC to the writer, reading and removing go on, and space
// that comes back can be used.
func TestFullDisk(t *testing.T) {
	p := start(t, setup{disk: cluster.Tmpfs, diskBytes: 400 << 20})
	p.run(1, "sh", "-c", "echo kept > /mnt/wp/kept; head -c 1000000 /dev/urandom > /mnt/wp/data")
	sum := p.run(2, "sha256sum", "/mnt/wp/data")
	for round := range pick(3, 8) {
		p.within(30*time.Second, "the space of removed files is back", func() error {
			free := strings.Fields(p.run(2, "df", "--output=avail", "-B1M", "/mnt/wp"))
			if n, err := strconv.Atoi(free[len(free)-1]); err != nil || n < 250 {
				return fmt.Errorf("df says %v MiB", free)
			}
			return nil
		})
		var f struct {
			Bytes int64
			Worst float64 `json:"worst_ms"`
		}
		fill := func(name string) {
			t.Helper()
			machine := cluster.Share()
			p.workload(1, 2*time.Minute, &f, "fill", "-file", "/mnt/wp/"+name, "-most", "2000000000")
			t.Logf("round %d: %s full after %d MiB, longest write %.0f ms", round, name, f.Bytes>>20, f.Worst)
			if f.Worst > ms(machine.Bound(3*time.Second)) {
				t.Errorf("round %d: a write took %.0f ms, with %s", round, f.Worst, machine)
			}
		}
		fill("filler")
		if f.Bytes < 100<<20 {
			t.Errorf("round %d: full after %d bytes of a disk of 400 MiB", round, f.Bytes)
		}
		for i := 1; i <= 3; i++ {
			if got := p.run(i, "cat", "/mnt/wp/kept"); got != "kept\n" {
				t.Errorf("n%d reads %q", i, got)
			}
			if got := p.run(i, "sha256sum", "/mnt/wp/data"); got != sum {
				t.Errorf("n%d reads %q, want %q", i, got, sum)
			}
		}
		// What the full bricks can still tidy up, they may give once more: to this
		// machine's writer, and to the other's.
		for k := 0; ; k++ {
			if k == 10 {
				t.Error("a full volume took more and more")
				break
			}
			if fill(fmt.Sprintf("filler-%d", k)); f.Bytes > 1<<20 {
				continue
			}
			r, err := p.Host(2).Run(p.ctx(patience), "sh", "-c", "head -c 5 /dev/zero > /mnt/wp/more && head -c 1000000 /dev/zero > /mnt/wp/more")
			if err == nil {
				continue
			}
			if !strings.Contains(r.Stderr, "No space left on device") {
				t.Errorf("the other machine's writer is told %q", r.Stderr)
			}
			break
		}
		p.identical(1)
		p.run(3, "sh", "-c", "rm -f /mnt/wp/filler* /mnt/wp/more")
		took := p.within(20*time.Second, "there is room again", func() error {
			_, err := p.Host(2).Run(p.ctx(patience), "sh", "-c", "head -c 50000000 /dev/zero > /mnt/wp/again && rm /mnt/wp/again")
			return err
		})
		t.Logf("round %d: room again after %v", round, took)
	}
	for i := 1; i <= 3; i++ {
		if n := strings.Count(p.Host(i).Log("mortar"), "level=WARN"); n > 50 {
			t.Errorf("n%d warned %d times", i, n)
		}
	}
	p.healed(1, 10*time.Second) // a full disk costs no brick its place; a slow one may, for a moment
}

// What happens to one brick's disk while its daemon is away is found when it
// comes back: said with names and remedies, never believed, never spread, and
// healed from the others if the brick still says whose it is.
func TestDamagedBricks(t *testing.T) {
	// flip changes bytes in a file: the middle of what has been written of it.
	flip := func(p *pool, path string) {
		p.t.Helper()
		f, err := os.OpenFile(p.outside(3, path), os.O_RDWR, 0)
		if err != nil {
			p.t.Fatal(err)
		}
		defer f.Close()
		b, err := io.ReadAll(f)
		if err != nil {
			p.t.Fatal(err)
		}
		end := len(bytes.TrimRight(b, "\x00"))
		if _, err := f.WriteAt([]byte("DAMAGE"), int64(end/2)); err != nil || end < 100 {
			p.t.Fatalf("%s has %d bytes: %v", path, end, err)
		}
	}
	files := func(p *pool, pattern string) []string {
		p.t.Helper()
		list := strings.Fields(p.run(3, "sh", "-c", "ls -tr "+brickDir+"/.mortar/"+pattern))
		if len(list) == 0 {
			p.t.Fatalf("n3's brick has no %s", pattern)
		}
		return list
	}
	shell := func(script string) func(*pool) {
		return func(p *pool) { p.t.Helper(); p.run(3, "sh", "-ec", script) }
	}
	const person, peers = false, true
	anyFile := "f=$(find " + brickDir + "/.mortar/data -type f -size +1000k | head -1); test -n \"$f\"; "
	for name, c := range map[string]struct {
		damage func(*pool)
		want   []string // parts of what status or the log says
		healed bool     // by its peers, or else left to a person
		crash  bool     // the daemon is killed before
	}{
		"brick directory deleted": {shell("rm -rf " + brickDir), []string{brickDir}, person, false},
		"brick directory emptied": {shell("rm -rf " + brickDir + "/.mortar"), []string{brickDir, "brick.json"}, person, false},
		"brick.json of another volume": {shell("sed -i 's/\"volume\": *\"[0-9a-f]\\{8\\}/\"volume\": \"00000000/' " + brickDir + "/.mortar/brick.json"),
			[]string{brickDir, "volume"}, person, false},
		"brick.json is nonsense": {shell("echo '{' > " + brickDir + "/.mortar/brick.json"), []string{"brick.json"}, person, false},
		"corrupt log record":     {func(p *pool) { l := files(p, "log/*"); flip(p, l[len(l)-1]) }, []string{brickDir + "/.mortar/log", "healed from its peers"}, peers, true},
		"corrupt table of the KV": {func(p *pool) {
			for _, f := range files(p, "meta/*.sst") {
				flip(p, f)
			}
		}, []string{brickDir + "/.mortar/meta", "healed from its peers"}, peers, false},
		"KV manifest gone":    {shell("rm -f " + brickDir + "/.mortar/meta/MANIFEST*"), []string{brickDir + "/.mortar/meta", "healed from its peers"}, peers, false},
		"data file truncated": {shell(anyFile + "truncate -s 4096 $f"), []string{brickDir + "/.mortar/data", "healed from its peers"}, peers, false},
		"data file deleted":   {shell(anyFile + "rm $f"), []string{brickDir + "/.mortar/data", "healed from its peers"}, peers, false},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			p := start(t, setup{})
			p.run(1, workload, "files", "-dir", "/mnt/wp/many", "-n", "1000")
			p.run(1, "dd", "if=/dev/urandom", "of=/mnt/wp/large", "bs=1M", "count=80", "conv=fsync", "status=none")
			p.run(1, workload, "files", "-dir", "/mnt/wp/many2", "-n", "300")
			p.leadElsewhereThan(3)
			if c.crash {
				p.killDaemon(3) // what it has is in its log
			} else {
				p.daemons[2].Signal(syscall.SIGTERM) // what it has is in its files
				<-p.daemons[2].Done()
			}
			c.damage(p)
			p.startDaemon(3)
			p.waitDaemon(3)
			// Whoever reads on the brick's own machine, while it finds out, sees no damage.
			sum := p.run(1, "sha256sum", "/mnt/wp/large")
			for end := time.Now().Add(5 * time.Second); c.healed && time.Now().Before(end); {
				got := p.run(3, "sh", "-c", "dd if=/mnt/wp/large bs=1M iflag=direct status=none | sha256sum")
				if strings.Fields(got)[0] != strings.Fields(sum)[0] {
					t.Fatalf("n3 reads %s, n1 %s", got, sum)
				}
			}
			// Some damage shows only when the place is read; a digest reads everything.
			var verify cluster.Result
			p.within(30*time.Second, "the brick is judged", func() error {
				st, err := p.status(1)
				if err != nil || st.Bricks[2].Problem != "" {
					return err
				}
				verify, _ = p.try(1, "volume", "heal", "wp", "full", "--verify")
				if strings.Contains(verify.Stdout, "not in sync") || !strings.Contains(verify.Stdout, "n3:") {
					return fmt.Errorf("no digest of n3's brick, and no problem with it: %s%s", verify.Stdout, verify.Stderr)
				}
				return nil
			})
			p.within(time.Minute, "the damage is told, and healed or left to a person", func() error {
				st, err := p.status(1)
				if err != nil {
					return err
				}
				b := st.Bricks[2]
				said := b.Problem + "\n" + verify.Stdout + verify.Stderr + p.Host(3).Log("mortar")
				for _, part := range c.want {
					if !strings.Contains(said, part) {
						return fmt.Errorf("nothing is said of %q: %+v\n%s", part, b, verify.Stdout)
					}
				}
				if !c.healed {
					if b.InSync || !strings.Contains(b.Problem, brickDir) {
						return fmt.Errorf("not shown as a problem: %+v", b)
					}
					return nil
				}
				if !b.InSync || b.Problem != "" {
					return fmt.Errorf("not healed: %+v", b)
				}
				if r, _ := p.try(1, "volume", "heal", "wp", "full", "--verify"); !strings.Contains(r.Stdout, "are identical") {
					return fmt.Errorf("in sync, as far as the others know, and not identical: %s%s", r.Stdout, r.Stderr)
				}
				return nil
			})
			// Nobody else is harmed, and nobody reads damage.
			want := strings.Join(p.manifest(1, "/mnt/wp"), "\n")
			for i := 2; i <= 3; i++ {
				if got := strings.Join(p.manifest(i, "/mnt/wp"), "\n"); got != want {
					t.Errorf("n%d sees another tree than n1", i)
				}
			}
			p.run(3, "sh", "-c", "echo on > /mnt/wp/goes")
			if got := p.run(1, "cat", "/mnt/wp/goes"); got != "on\n" {
				t.Errorf("n1 reads %q", got)
			}
		})
	}
}

// A disk that is not mounted when the daemon starts is not filled in its place.
func TestUnmountedDisk(t *testing.T) {
	p := start(t, setup{disk: cluster.Tmpfs, diskBytes: 1 << 30})
	p.leadElsewhereThan(3)
	p.run(1, "sh", "-c", "echo kept > /mnt/wp/file")
	p.daemons[2].Signal(syscall.SIGTERM)
	<-p.daemons[2].Done()
	if err := p.Host(3).UnmountDisk(); err != nil {
		t.Fatal(err)
	}
	p.startDaemon(3)
	p.waitDaemon(3)
	p.within(10*time.Second, "the brick is reported", func() error {
		st, err := p.status(1)
		if err == nil && (st.Bricks[2].Online || !strings.Contains(st.Bricks[2].Problem, brickDir)) {
			err = fmt.Errorf("%+v", st.Bricks[2])
		}
		return err
	})
	if out := p.run(3, "sh", "-c", "ls -A /bricks"); out != "" {
		t.Errorf("the empty mount point was written to: %q", out)
	}
	if got := p.run(3, "cat", "/mnt/wp/file"); got != "kept\n" {
		t.Errorf("n3, without its brick, reads %q", got)
	}
	if err := p.Host(3).MountDisk(); err != nil {
		t.Fatal(err)
	}
	// Mounted, it is taken back: by itself, or at the latest by "start force".
	p.mortar(1, "volume", "start", "wp", "force")
	p.healed(1, 30*time.Second)
	p.identical(1)
}

// A brick's directory can be read without any daemon.
func TestBrickCommands(t *testing.T) {
	p := start(t, setup{})
	archive, _ := p.wordpress()
	p.run(1, "mkdir", "/mnt/wp/tree")
	p.run(1, "tar", "-xpf", archive, "-C", "/mnt/wp/tree")
	p.run(1, "dd", "if=/dev/urandom", "of=/mnt/wp/large", "bs=1M", "count=20", "status=none")
	want := p.manifest(1, "/mnt/wp")
	sum := p.run(1, "sh", "-c", "sha256sum < /mnt/wp/large")
	p.run(2, "umount", "/mnt/wp")
	p.daemons[1].Signal(syscall.SIGTERM)
	<-p.daemons[1].Done()
	p.mortar(2, "brick", "check", brickDir)
	if got := p.mortar(2, "brick", "ls", brickDir); !strings.Contains(got, "large") || !strings.Contains(got, "tree") {
		t.Errorf("brick ls:\n%s", got)
	}
	if got := p.run(2, "sh", "-c", mortar+" brick cat "+brickDir+" /large | sha256sum"); got != sum {
		t.Errorf("brick cat: %s, want %s", got, sum)
	}
	p.mortar(2, "brick", "export", brickDir, "/bricks/exported")
	got := p.manifest(2, "/bricks/exported")
	if a, b := strings.Join(got[1:], "\n"), strings.Join(want[1:], "\n"); a != b {
		t.Errorf("the exported tree differs from the volume's:\n%.3000s\nwant\n%.3000s", a, b)
	}
	if out := p.mortar(2, "brick", "dump", brickDir); !strings.Contains(out, "large") {
		t.Error("brick dump does not speak of the file large")
	}
	p.refuse(2, []string{"brick", "export", brickDir, "/bricks/exported"}, "/bricks/exported")
	p.startDaemon(2)
	p.waitDaemon(2)
	p.healed(1, 30*time.Second)
	p.identical(1)
	os.Remove(filepath.Join(p.Dir, "wordpress.tar"))
}

// The demo makes its three peers and leaves nothing behind.
func TestDemo(t *testing.T) {
	c := cluster.Start(t, cluster.Options{Hosts: 1, Share: []string{binDir}})
	h := c.Host(1)
	demo, err := h.Spawn("demo", mortar, "demo")
	if err != nil {
		t.Fatal(err)
	}
	p := &pool{Cluster: c, t: t}
	var mounts []string
	p.within(60*time.Second, "the demo mounts its volume three times", func() error {
		select {
		case <-demo.Done():
			t.Fatalf("the demo ended:\n%s", h.Log("demo"))
		default:
		}
		out, err := h.Run(p.ctx(5*time.Second), "awk", "$3 == \"fuse.mortar\" {print $2}", "/proc/self/mounts")
		if mounts = strings.Fields(out.Stdout); err == nil && len(mounts) != 3 {
			err = fmt.Errorf("%d mounts\n%s", len(mounts), h.Log("demo"))
		}
		return err
	})
	p.run(1, "sh", "-c", "echo shown > "+mounts[0]+"/file")
	for _, m := range mounts {
		if got := p.run(1, "cat", m+"/file"); got != "shown\n" {
			t.Errorf("%s reads %q", m, got)
		}
	}
	demo.Signal(syscall.SIGINT)
	if err := demo.Wait(p.ctx(20 * time.Second)); err != nil {
		t.Errorf("Ctrl-C: %v\n%s", err, h.Log("demo"))
	}
	p.within(5*time.Second, "nothing is left", func() error {
		if rest := h.Processes(); len(rest) > 0 {
			return fmt.Errorf("processes %+v", rest)
		}
		out := p.run(1, "sh", "-c", "grep mortar /proc/self/mounts | grep -v "+c.Dir+"; ls /tmp /var/tmp; true")
		if strings.Contains(out, "fuse") || strings.Contains(out, "mortar-demo") {
			return fmt.Errorf("%s", out)
		}
		return nil
	})
}
