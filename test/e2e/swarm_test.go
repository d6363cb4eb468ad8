package e2e

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"
)

// deployDir are the files that users take.
const deployDir = "../../deploy"

// swarm makes one Swarm of all engines, each a manager unless it is said to be a worker. Down is how
// long a silent machine is given, one third of which passes between two signs of life.
func (e *engines) swarm(down time.Duration, workers ...int) {
	e.t.Helper()
	for i := range e.Hosts() {
		e.within(20*time.Second, fmt.Sprintf("the engine of n%d knows the driver", i+1), func() error {
			if drivers := e.docker(i+1, "info", "--format", "{{.Plugins.Volume}}"); !strings.Contains(drivers, "mortar") {
				return fmt.Errorf("volume drivers %s", drivers)
			}
			return nil
		})
	}
	e.docker(1, "swarm", "init", "--advertise-addr", e.Host(1).Addr, "--dispatcher-heartbeat", (down / 3).String())
	for i := 2; i <= len(e.Hosts()); i++ {
		role := "manager"
		if slices.Contains(workers, i) {
			role = "worker"
		}
		token := e.docker(1, "swarm", "join-token", "-q", role)
		e.docker(i, "swarm", "join", "--token", token, "--advertise-addr", e.Host(i).Addr, e.Host(1).Addr+":2377")
	}
	e.nodes = map[string]string{}
	for i, h := range e.Hosts() {
		e.nodes[e.docker(i+1, "info", "--format", "{{.Swarm.NodeID}}")] = h.Name
	}
	// Engines tell each other by gossip where containers are. One that is told of a network before it knows who
	// else is in it misses what it is told, and asks for it half a minute later.
	for i := range e.Hosts() {
		e.within(2*time.Minute, fmt.Sprintf("the engine of n%d has met the others", i+1), func() error {
			r, err := e.Host(i+1).Run(e.ctx(10*time.Second), "docker", "network", "inspect", "ingress", "--format", "{{range .Peers}}{{.IP}} {{end}}")
			if err == nil && len(strings.Fields(r.Stdout)) != len(e.Hosts()) {
				err = fmt.Errorf("it knows %q", r.Stdout)
			}
			return err
		})
	}
}

// task is a container of a service as the Swarm knows it.
type task struct {
	ID           string
	ServiceID    string
	NodeID       string
	DesiredState string
	Status       struct {
		State     string
		Timestamp time.Time
		Err       string
	}
}

// tasks are the tasks of a service that are to run, as machine i knows it, by node's name.
func (e *engines) tasks(i int, service string) (running []task, nodes []string, err error) {
	ids, err := e.Host(i).Run(e.ctx(10*time.Second), "docker", "service", "ps", "-q", "--no-trunc", "--filter", "desired-state=running", service)
	if err != nil || strings.TrimSpace(ids.Stdout) == "" {
		return nil, nil, errors.Join(err, errors.New("no task is to run"))
	}
	r, err := e.Host(i).Run(e.ctx(10*time.Second), append([]string{"docker", "inspect", "--type", "task"}, strings.Fields(ids.Stdout)...)...)
	if err == nil {
		err = json.Unmarshal([]byte(r.Stdout), &running)
	}
	if err != nil {
		return nil, nil, err
	}
	for _, t := range running {
		if t.Status.State != "running" {
			return running, nil, fmt.Errorf("%s: a task is %s %s", service, t.Status.State, t.Status.Err)
		}
		nodes = append(nodes, e.nodes[t.NodeID])
	}
	slices.Sort(nodes)
	return running, nodes, nil
}

// settles waits until a service has so many running tasks and none of them, nor one
// that is to run, on a machine that was left; it returns where they are, and when
// the last of them ran.
func (e *engines) settles(limit time.Duration, service string, want int, left ...string) (on []string, last time.Time) {
	e.t.Helper()
	e.within(limit, fmt.Sprintf("%s has %d running containers", service, want), func() error {
		running, nodes, err := e.tasks(1, service)
		if err != nil {
			return err
		}
		if len(nodes) != want || slices.ContainsFunc(left, func(n string) bool { return slices.Contains(nodes, n) }) {
			return fmt.Errorf("they are on %v", nodes)
		}
		on, last = nodes, time.Time{}
		for _, t := range running {
			if t.Status.Timestamp.After(last) {
				last = t.Status.Timestamp
			}
		}
		return nil
	})
	return on, last
}

// slowestMount is how long engines have waited for mounts of a volume at most.
func (e *engines) slowestMount(volume string) (slowest time.Duration) {
	e.t.Helper()
	n := 0
	for _, h := range e.Hosts() {
		for line := range strings.Lines(h.Log("mortar")) {
			m := mountTook.FindStringSubmatch(line)
			if m == nil || m[1] != volume {
				continue
			}
			took, err := time.ParseDuration(m[2])
			if err != nil {
				e.t.Fatal(err)
			}
			slowest = max(slowest, took)
			n++
		}
	}
	if n == 0 {
		e.t.Errorf("no engine has asked for %s", volume)
	}
	return slowest
}

// mountTook finds the answers to engines in a daemon's log.
var mountTook = regexp.MustCompile(`msg=VolumeDriver\.Mount .*volume=(\S+) .*took=(\S+)`)

// http is a client on a machine.
func (p *pool) http(i int) *http.Client {
	return &http.Client{Timeout: 20 * time.Second, Transport: &http.Transport{DisableKeepAlives: true,
		DialContext: func(_ context.Context, _, addr string) (net.Conn, error) { return p.Host(i).Dial(addr) }}}
}

// errNobody is what the demo application's balancer says while it knows no container that listens.
var errNobody = errors.New("503 Service Unavailable")

// get fetches a page on a machine, and says which container it came from.
func (p *pool) get(i int, url string) (text, container string, err error) {
	resp, err := p.http(i).Get(url)
	if err != nil {
		return "", "", err
	}
	defer resp.Body.Close()
	raw, err := io.ReadAll(resp.Body)
	if err == nil && resp.StatusCode >= 300 {
		err = fmt.Errorf("%s: %s: %s", url, resp.Status, raw)
		if resp.StatusCode == http.StatusServiceUnavailable {
			err = fmt.Errorf("%s: %w: %s", url, errNobody, raw)
		}
	}
	return string(raw), resp.Header.Get("X-Container"), err
}

// demoImage makes the demo application's image on every machine.
func (e *engines) demoImage() {
	e.t.Helper()
	dir := filepath.Join(e.Dir, "demo")
	cmd := exec.Command("go", "build", "-o", dir+"/demoapp", "mortar/deploy/demoapp")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	out, err := cmd.CombinedOutput()
	if err == nil {
		out, err = exec.Command("tar", "-C", dir, "-cf", dir+".tar", ".").CombinedOutput()
	}
	if err != nil {
		e.t.Fatalf("%v\n%s", err, out)
	}
	for i := range e.Hosts() {
		e.docker(i+1, "import", "-c", `ENTRYPOINT ["/demoapp"]`, dir+".tar", "demoapp")
	}
}

// stack deploys a file of deploy/ from machine 1, with pairs of texts replaced.
func (e *engines) stack(file, name string, edits ...string) {
	e.t.Helper()
	dir := filepath.Join(e.Dir, "deploy-"+name)
	if err := os.CopyFS(dir, os.DirFS(filepath.Join(deployDir, filepath.Dir(file)))); err != nil {
		e.t.Fatal(err)
	}
	copied := filepath.Join(dir, filepath.Base(file))
	text := readFile(copied)
	for k := 0; k+1 < len(edits); k += 2 {
		if !strings.Contains(text, edits[k]) {
			e.t.Fatalf("%s has no %q", file, edits[k])
		}
		text = strings.ReplaceAll(text, edits[k], edits[k+1])
	}
	if err := os.WriteFile(copied, []byte(text), 0o644); err != nil {
		e.t.Fatal(err)
	}
	e.docker(1, "stack", "deploy", "--resolve-image", "never", "-c", copied, name)
}

// deployFiles demands of every file of deploy/ for engines that one takes it, and the
// driver its volumes. Nothing of it runs: no machine takes containers.
func (e *engines) deployFiles() {
	e.t.Helper()
	for i := range e.Hosts() {
		e.docker(1, "node", "update", "--availability", "drain", e.Host(i+1).Name)
	}
	if _, err := e.Host(1).RunInput(e.ctx(patience), "x", "docker", "secret", "create", "wordpress_db", "-"); err != nil {
		e.t.Fatal(err)
	}
	dir := filepath.Join(e.Dir, "deploy")
	if err := os.CopyFS(dir, os.DirFS(deployDir)); err != nil {
		e.t.Fatal(err)
	}
	files, err := filepath.Glob(dir + "/*/*.yml")
	if err != nil || len(files) < 4 {
		e.t.Fatalf("files to deploy: %q, %v", files, err)
	}
	for _, file := range files {
		name := strings.TrimPrefix(file, dir+"/")
		argv := []string{"env", "WORDPRESS_DB_PASSWORD=x", "docker", "stack", "deploy", "--resolve-image", "never"}
		if base, _, more := strings.Cut(filepath.Base(file), "-"); more { // it says more about another one
			argv = append(argv, "-c", filepath.Join(filepath.Dir(file), base+".yml"))
		}
		e.run(1, append(argv, "-c", file, "check")...)
		var services []struct {
			Spec struct {
				Name         string
				TaskTemplate struct {
					ContainerSpec struct {
						Mounts []struct {
							Type, Source  string
							VolumeOptions struct {
								DriverConfig struct {
									Name    string
									Options map[string]string
								}
							}
						}
					}
					Resources struct{ Limits struct{ MemoryBytes int64 } }
				}
				EndpointSpec struct{ Mode string }
			}
		}
		ids := strings.Fields(e.docker(1, "stack", "services", "-q", "check"))
		if err := json.Unmarshal([]byte(e.docker(1, append([]string{"service", "inspect"}, ids...)...)), &services); err != nil {
			e.t.Fatal(err)
		}
		made := map[string]bool{}
		for _, s := range services {
			spec := s.Spec
			if swarm := strings.HasPrefix(name, "swarm/"); swarm && (spec.TaskTemplate.Resources.Limits.MemoryBytes == 0 || spec.EndpointSpec.Mode != "dnsrr") {
				e.t.Errorf("%s: service %s has no limit of memory, or needs IPVS", name, spec.Name)
			}
			for _, m := range spec.TaskTemplate.ContainerSpec.Mounts {
				if m.Type != "volume" {
					continue
				}
				driver := m.VolumeOptions.DriverConfig
				if driver.Name != "mortar" {
					e.t.Errorf("%s: volume %s has driver %q", name, m.Source, driver.Name)
				}
				argv := []string{"volume", "create", "-d", driver.Name}
				for k, v := range driver.Options {
					argv = append(argv, "-o", k+"="+v)
				}
				e.docker(1, append(argv, m.Source)...)
				made[m.Source] = true
			}
		}
		if len(made) == 0 {
			e.t.Errorf("%s has no volumes", name)
		}
		e.docker(1, "stack", "rm", "check")
		for v := range made {
			e.docker(2, "volume", "rm", v)
		}
	}
}

// TestSwarm is the walkthrough of a Swarm of three machines, in its long form two managers and a worker, with an
// application that is scaled: deployed with a stack file, its containers on all machines have the same
// files; those of a machine that is drained, or dies, come back elsewhere with their data,
// as fast as those of the same application without a volume.
func TestSwarm(t *testing.T) {
	p := start(t, setup{mounts: -1})
	e := startEngines(t, p)
	defer e.stopEngines()
	e.demoImage()
	e.swarm(pick(3*time.Second, 15*time.Second), pick(nil, []int{3})...) // a worker in the long form
	const volume = "demoapp_app"
	e.stack("swarm/demoapp.yml", "demoapp")
	// The same without a volume: how fast a Swarm is by itself.
	e.stack("swarm/demoapp.yml", "bare", "    volumes:\n      - app:/app\n", "", `"/app"]`, `"/"]`, "published: 8080", "published: 8081")
	e.settles(40*time.Second, "demoapp_web", 3)
	e.settles(20*time.Second, "demoapp_app", 1)

	// A one-off container writes the project.
	write := func(i int, text string) {
		t.Helper()
		e.docker(i, "run", "--rm", "--network", "none", "--mount", "type=volume,src="+volume+",dst=/app,volume-driver=mortar", "demoapp", "write", "/app/index.html", text)
	}
	// same demands that every machine is answered with a text, by so many machines' containers.
	same := func(text string, containers int) {
		t.Helper()
		by := map[string]bool{}
		for n := 0; n < 3*len(p.Hosts()) || len(by) < containers && n < 100; n++ {
			i := n%len(p.Hosts()) + 1
			got, container, err := p.get(i, "http://"+p.Host(i).Addr+":8080/")
			if err != nil || got != text+"\n" {
				t.Fatalf("n%d is answered %q, %v; want %q", i, got, err, text)
			}
			by[container] = true
		}
		if len(by) != containers {
			t.Errorf("answers come from %v", by)
		}
	}
	write(2, "one")
	// Here alone the balancers of two machines depend on what their engines were told of a third; later there is a
	// container of the application on every machine that is asked. What has been missed is asked for after half a minute,
	// for half a minute ("Bulk sync to node ... timed out" in the engine's log).
	took := p.within(2*time.Minute, "the balancers of all machines find the application", func() error {
		for i, h := range p.Hosts() {
			if _, _, err := p.get(i+1, "http://"+h.Addr+":8080/"); errors.Is(err, errNobody) {
				return err
			}
		}
		return nil
	})
	t.Logf("all machines' balancers find the application after %v", took.Round(time.Millisecond))
	same("one", 1)
	e.docker(1, "service", "scale", "--detach", "demoapp_app=3", "bare_app=3")
	if nodes, _ := e.settles(30*time.Second, "demoapp_app", 3); !slices.Equal(nodes, []string{"n1", "n2", "n3"}) {
		t.Errorf("scaled to three, it runs on %v", nodes)
	}
	e.settles(30*time.Second, "bare_app", 3)
	same("one", 3)
	write(3, "two")
	same("two", 3)
	for i := range p.Hosts() {
		if got := e.docker(i+1, "volume", "ls", "--format", "{{.Driver}} {{.Name}}"); got != "mortar "+volume {
			t.Errorf("volume ls on n%d says %q", i+1, got)
		}
	}
	e.refuseDocker(1, []string{"volume", "rm", volume}, "in use")

	// What guests were told is written stays so, whatever happens to the containers.
	end, guests := make(chan struct{}), make(chan []string, 1)
	go func() {
		var told []string
		client := p.http(1)
		for k := 0; ; k++ {
			select {
			case <-end:
				guests <- told
				return
			default:
			}
			name := fmt.Sprint("guest ", k)
			resp, err := client.Post("http://"+p.Host(1).Addr+":8080/guests", "text/plain", strings.NewReader(name))
			if err != nil {
				continue
			}
			resp.Body.Close()
			if resp.StatusCode == http.StatusCreated {
				told = append(told, name)
			}
		}
	}()
	// moved waits until nothing of either application is on a machine, and compares.
	moved := func(from string, what string) {
		t.Helper()
		var last [2]time.Time
		for k, service := range []string{"demoapp_app", "bare_app"} {
			var nodes []string
			if nodes, last[k] = e.settles(60*time.Second, service, 3, from); slices.Contains(nodes, from) {
				t.Errorf("%s: %s runs on %v", what, service, nodes)
			}
		}
		// What the volume adds to the Swarm's own time is the mount. The other comparison
		// has the noise of two Swarm services in it, more of it where the machine is busy.
		late, mount := last[0].Sub(last[1]), e.slowestMount(volume)
		t.Logf("%s: containers with the volume ran %.2f s after those without; the slowest mount so far took %v", what, late.Seconds(), mount)
		if mount > 2*time.Second || long && late > 2*time.Second {
			t.Errorf("%s: with the volume it took longer", what)
		}
		got, _, err := p.get(1, "http://"+p.Host(1).Addr+":8080/")
		if err != nil || got != "two\n" {
			t.Errorf("%s: n1 is answered %q, %v", what, got, err)
		}
	}
	e.docker(1, "node", "update", "--availability", "drain", "n2")
	moved("n2", "n2 drained")
	e.nothingMounted(2)
	e.docker(1, "node", "update", "--availability", "active", "n2")
	if err := errors.Join(p.Host(3).Unplug(), p.Host(3).KillAll()); err != nil {
		t.Fatal(err)
	}
	moved("n3", "n3 dead")
	e.settles(30*time.Second, "demoapp_web", 2, "n3") // n2 has one again
	close(end)
	told := <-guests
	text, _, err := p.get(2, "http://"+p.Host(2).Addr+":8080/guests")
	if err != nil {
		t.Fatal(err)
	}
	book := map[string]bool{}
	for line := range strings.Lines(text) {
		book[strings.TrimSpace(line)] = true
	}
	for _, name := range told {
		if !book[name] {
			t.Errorf("%s was told that he is in the book, and is not", name)
		}
	}
	if len(told) < 20 {
		t.Errorf("only %d guests", len(told))
	}
	t.Logf("%d guests", len(told))

	// The machine comes back, and does its part again.
	if err := p.Host(3).Plug(); err != nil {
		t.Fatal(err)
	}
	e.boot(3)
	e.docker(1, "stack", "rm", "bare")
	if long {
		// It tells the Swarm what drivers it has every 20 s.
		p.within(60*time.Second, "n3 takes containers again", func() error {
			e.docker(1, "service", "update", "--detach", "--force", "demoapp_app")
			nodes, _ := e.settles(30*time.Second, "demoapp_app", 3)
			if !slices.Contains(nodes, "n3") {
				return fmt.Errorf("%v", nodes)
			}
			return nil
		})
		e.settles(30*time.Second, "demoapp_web", 3)
		same("two", 3)
	}
	e.docker(1, "stack", "rm", "demoapp")
	for i := range p.Hosts() {
		e.nothingMounted(i + 1)
	}
	// An engine that was killed can keep a stopped container of before, which the Swarm does not
	// ask it to remove any more (moby's, and seen once): that nothing of it is mounted stands above.
	p.within(20*time.Second, "the volume can be removed", func() error {
		e.docker(3, "container", "prune", "-f")
		_, err := p.Host(3).Run(p.ctx(patience), "docker", "volume", "rm", volume)
		return err
	})
	e.deployFiles()
	p.healed(1, 30*time.Second)
	p.identical(1)
}
