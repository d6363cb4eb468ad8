package e2e

import (
	"archive/zip"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"html"
	"image"
	"image/png"
	"io"
	"math/rand/v2"
	"mime/multipart"
	"net"
	"net/http"
	"net/http/cookiejar"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"
)

// site is a WordPress that answers on every machine.
type site struct {
	p      *pool
	via    int // the machine that is asked
	client *http.Client
}

const siteURL = "http://wordpress.test" // resolved by nobody: dialled on the machine that is asked

func (p *pool) site() *site {
	s := &site{p: p, via: 1}
	jar, err := cookiejar.New(nil)
	if err != nil {
		p.t.Fatal(err)
	}
	s.client = &http.Client{Jar: jar, Timeout: time.Minute, Transport: &http.Transport{DisableKeepAlives: true,
		DialContext: func(context.Context, string, string) (net.Conn, error) {
			h := p.Host(s.via)
			return h.Dial(h.Addr + ":80")
		}}}
	return s
}

// do sends a request and returns what was answered.
func (s *site) do(r *http.Request) (text string, header http.Header, err error) {
	resp, err := s.client.Do(r)
	if err != nil {
		return "", nil, err
	}
	defer resp.Body.Close()
	raw, err := io.ReadAll(resp.Body)
	if err == nil && resp.StatusCode >= 300 {
		err = fmt.Errorf("%s %s by n%d: %s: %.2000s", r.Method, r.URL, s.via, resp.Status, raw)
	}
	return string(raw), resp.Header, err
}

func (s *site) get(path string) (string, http.Header, error) {
	r, err := http.NewRequest(http.MethodGet, siteURL+path, nil)
	if err != nil {
		return "", nil, err
	}
	return s.do(r)
}

// must is get that succeeds.
func (s *site) must(path string) string {
	s.p.t.Helper()
	text, _, err := s.get(path)
	if err != nil {
		s.p.t.Fatal(err)
	}
	return text
}

// post sends a form; the answer must contain a text.
func (s *site) post(path string, form url.Values, want string) {
	s.p.t.Helper()
	r, err := http.NewRequest(http.MethodPost, siteURL+path, strings.NewReader(form.Encode()))
	if err != nil {
		s.p.t.Fatal(err)
	}
	r.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	text, _, err := s.do(r)
	if err != nil || !strings.Contains(text, want) {
		s.p.t.Fatalf("POST %s: no %q: %v\n%s", path, want, err, text)
	}
}

// pluginArchive is a plugin of WordPress: it says its version in a header of every page, and has a file that
// the web server hands out by itself.
func pluginArchive(version string) ([]byte, error) {
	var out bytes.Buffer
	z := zip.NewWriter(&out)
	for name, text := range map[string]string{
		"three-machines/three-machines.php": "<?php\n/*\nPlugin Name: Three machines\nVersion: " + version + "\n*/\nadd_action('send_headers', function () { header('X-Plugin: " + version + "'); });\n",
		"three-machines/asset.txt":          version,
	} {
		f, err := z.Create(name)
		if err == nil {
			_, err = io.WriteString(f, text)
		}
		if err != nil {
			return nil, err
		}
	}
	err := z.Close()
	return out.Bytes(), err
}

// link finds where a page leads to.
func (s *site) link(page, pattern string) string {
	s.p.t.Helper()
	m := regexp.MustCompile(`href="([^"]*` + pattern + `[^"]*)"`).FindStringSubmatch(page)
	if m == nil {
		s.p.t.Fatalf("no link with %s in\n%s", pattern, page)
	}
	to := html.UnescapeString(m[1])
	if i := strings.Index(to, "/wp-admin/"); i >= 0 {
		return to[i:]
	}
	return "/wp-admin/" + to
}

// plugin installs a version of the plugin through the administrator's pages, or upgrades to it.
func (s *site) plugin(version string, upgrade bool) {
	s.p.t.Helper()
	form := s.must("/wp-admin/plugin-install.php?tab=upload")
	nonce := regexp.MustCompile(`(?s)upload-plugin.*?name="_wpnonce" value="(\w+)"`).FindStringSubmatch(form)
	if nonce == nil {
		s.p.t.Fatalf("no form for plugins:\n%s", form)
	}
	archive, err := pluginArchive(version)
	if err != nil {
		s.p.t.Fatal(err)
	}
	page := s.file("/wp-admin/update.php?action=upload-plugin", map[string]string{"_wpnonce": nonce[1]}, "pluginzip", "three-machines.zip", archive)
	if upgrade {
		page = s.must(s.link(page, "overwrite=update-plugin"))
		if !strings.Contains(page, "updated successfully") {
			s.p.t.Fatalf("the upgrade says\n%s", page)
		}
		return
	}
	s.must(s.link(page, "action=activate"))
}

// file sends a form with a file and returns the answer.
func (s *site) file(path string, fields map[string]string, field, name string, content []byte) string {
	s.p.t.Helper()
	var body bytes.Buffer
	m := multipart.NewWriter(&body)
	var err error
	for k, v := range fields {
		err = errors.Join(err, m.WriteField(k, v))
	}
	part, err2 := m.CreateFormFile(field, name)
	if err = errors.Join(err, err2); err == nil {
		_, err = part.Write(content)
	}
	err = errors.Join(err, m.Close())
	r, err2 := http.NewRequest(http.MethodPost, siteURL+path, &body)
	if err = errors.Join(err, err2); err != nil {
		s.p.t.Fatal(err)
	}
	r.Header.Set("Content-Type", m.FormDataContentType())
	text, _, err := s.do(r)
	if err != nil {
		s.p.t.Fatal(err)
	}
	return text
}

// upload adds a picture to the media library and returns its path.
func (s *site) upload(name string, content []byte) string {
	s.p.t.Helper()
	page := s.must("/wp-admin/media-new.php")
	nonce := regexp.MustCompile(`name="_wpnonce" value="(\w+)"`).FindStringSubmatch(page)
	if nonce == nil {
		s.p.t.Fatalf("no form for uploads:\n%s", page)
	}
	text := s.file("/wp-admin/async-upload.php", map[string]string{"name": name, "action": "upload-attachment", "_wpnonce": nonce[1]}, "async-upload", name, content)
	var answer struct {
		Success bool
		Data    struct{ URL string }
	}
	if err := json.Unmarshal([]byte(text), &answer); err != nil || !answer.Success {
		s.p.t.Fatalf("upload: %v: %s", err, text)
	}
	return strings.TrimPrefix(answer.Data.URL, siteURL)
}

// wordpressImages makes, on every machine, the images that deploy/ names, of Debian's packages.
func (e *engines) wordpressImages() {
	e.t.Helper()
	tree := "/var/cache/mortar-test/wordpress-root"
	if out, err := exec.Command("../wordpress/make", tree).CombinedOutput(); err != nil {
		e.t.Skipf("SKIPPED: there is no tree with WordPress, nginx, PHP and MariaDB, and it cannot be made: %v\n%s", err, out)
	}
	archive := filepath.Join(e.Dir, "wordpress.tar")
	if out, err := exec.Command("tar", "-C", tree, "-cf", archive, ".").CombinedOutput(); err != nil {
		e.t.Fatalf("%v\n%s", err, out)
	}
	for i := range e.Hosts() {
		e.docker(i+1, "import", archive, "debian-wordpress")
		for image, lines := range map[string]string{
			"wordpress:6-fpm": `ENTRYPOINT ["/test/php"]`,
			"mariadb:10.11":   `ENTRYPOINT ["/test/db"]`,
			"nginx:1.26":      `CMD ["nginx", "-g", "daemon off;"]`,
		} {
			if _, err := e.Host(i+1).RunInput(e.ctx(patience), "FROM debian-wordpress\n"+lines+"\n", "env", "DOCKER_BUILDKIT=0", "docker", "build", "-t", image, "-"); err != nil {
				e.t.Fatal(err)
			}
		}
	}
}

// TestWordPress is WordPress, nginx, PHP and MariaDB on a Swarm of three machines, as
// deploy/swarm/wordpress.yml has them: installed, used through one machine and seen
// through the others at once, and there when a machine dies, that of the database too.
func TestWordPress(t *testing.T) {
	if !long {
		t.Skip("LEFT OUT without MORTAR_TEST_LONG=1: WordPress on a Swarm takes minutes, and an image of half a gigabyte")
	}
	p := start(t, setup{mounts: -1})
	e := startEnginesWith(t, p, "overlay2")
	defer e.stopEngines()
	e.wordpressImages()
	e.swarm(15 * time.Second)
	if _, err := p.Host(1).RunInput(p.ctx(patience), "secret of the test", "docker", "secret", "create", "wordpress_db", "-"); err != nil {
		t.Fatal(err)
	}
	// n1 is where the test looks from, so it is not the one that dies.
	const order = "      update_config: {order: stop-first}\n"
	begin := time.Now()
	e.stack("swarm/wordpress.yml", "wordpress", order, order+"      placement:\n        constraints: [\"node.hostname != n1\"]\n")
	at := func() (db string) {
		t.Helper()
		for _, service := range []string{"lb", "web", "php"} {
			e.settles(3*time.Minute, "wordpress_"+service, 3)
		}
		on, _ := e.settles(3*time.Minute, "wordpress_db", 1)
		return on[0]
	}
	db := at()
	t.Logf("up after %.1f s, the database on %s", time.Since(begin).Seconds(), db)

	s := p.site()
	p.within(time.Minute, "the installation page is there", func() error {
		_, _, err := s.get("/wp-admin/install.php")
		return err
	})
	const password = "correct horse battery staple"
	s.post("/wp-admin/install.php?step=2", url.Values{"weblog_title": {"Three machines"}, "user_name": {"admin"}, "admin_password": {password},
		"admin_password2": {password}, "pw_weak": {"1"}, "admin_email": {"admin@example.org"}, "blog_public": {"0"}}, "Success!")
	s.must("/wp-login.php")
	s.post("/wp-login.php", url.Values{"log": {"admin"}, "pwd": {password}, "testcookie": {"1"}, "redirect_to": {siteURL + "/wp-admin/"}}, "Dashboard")

	picture := image.NewGray(image.Rect(0, 0, 400, 300))
	for k := range picture.Pix {
		picture.Pix[k] = byte(rand.Uint32())
	}
	var file bytes.Buffer
	if err := png.Encode(&file, picture); err != nil {
		t.Fatal(err)
	}
	// shown demands a file from every machine that is named.
	shown := func(path, want string, machines ...int) {
		t.Helper()
		for _, i := range machines {
			for range 4 { // whichever nginx and PHP it is handed to
				s.via = i
				if got := s.must(path); got != want {
					t.Fatalf("n%d answers %d bytes for %s, want %d", i, len(got), path, len(want))
				}
			}
		}
	}
	for i := range p.Hosts() {
		s.via = i + 1
		shown(s.upload(fmt.Sprintf("picture%d.png", i), file.Bytes()), file.String(), 1, 2, 3)
	}
	// A file that is changed on a machine is new everywhere; a program within the 2 s for
	// which PHP does not look again.
	edit := func(i int, path, text string) {
		t.Helper()
		e.docker(i, "run", "--rm", "--network", "none", "-v", "wordpress_html:/html", "--entrypoint", "/bin/sh", "debian-wordpress", "-ec",
			"mkdir -p $(dirname /html"+path+"); printf '%s' '"+text+"' > /html"+path)
	}
	for k := range 4 {
		i := k%3 + 1
		text := fmt.Sprint("version ", k)
		edit(i, "/wp-content/plugin.css", text)
		shown("/wp-content/plugin.css", text, 1, 2, 3)
		edit(i, "/wp-content/mu-plugins/version.php", fmt.Sprintf(`<?php header("X-Version: %d");`, k))
		time.Sleep(2 * time.Second) // opcache.revalidate_freq
		for via := 1; via <= 3; via++ {
			for range 4 {
				s.via = via
				if _, h, err := s.get("/"); err != nil || h.Get("X-Version") != fmt.Sprint(k) {
					t.Errorf("n%d, asked for version %d, shows %q: %v", via, k, h.Get("X-Version"), err)
				}
			}
		}
	}

	// A plugin is installed through one machine and upgraded through the next, by the administrator's own pages:
	// what the web server hands out is new at once, pages as soon as PHP looks again.
	for k, version := range []string{"1.0", "1.1", "1.2"} {
		s.via = k + 1
		s.plugin(version, k > 0)
		shown("/wp-content/plugins/three-machines/asset.txt", version, 1, 2, 3)
		time.Sleep(2 * time.Second) // opcache.revalidate_freq
		for via := 1; via <= 3; via++ {
			for range 4 {
				s.via = via
				if _, h, err := s.get("/"); err != nil || h.Get("X-Plugin") != version {
					t.Errorf("n%d, with version %s of the plugin, shows %q: %v", via, version, h.Get("X-Plugin"), err)
				}
			}
		}
	}

	// A machine dies; then, when it is back, the one with the database.
	other := map[string]string{"n2": "n3", "n3": "n2"}
	last := s.upload("last.png", file.Bytes())
	for _, dies := range []string{other[db], db} {
		k := slices.Index([]string{"n1", "n2", "n3"}, dies) + 1
		alive := []int{1, 5 - k}
		t0 := time.Now()
		if err := errors.Join(p.Host(k).Unplug(), p.Host(k).KillAll()); err != nil {
			t.Fatal(err)
		}
		// Where the database lives on, every page comes; where not, when the Swarm has moved it.
		visitor := p.site()
		visitor.client.Timeout = 5 * time.Second
		var slowest, away time.Duration
		pages, failed := 0, 0
		for time.Since(t0) < 40*time.Second || away > 0 && time.Since(t0)-away < 5*time.Second && time.Since(t0) < 2*time.Minute {
			visitor.via = alive[pages%2]
			pages++
			asked := time.Now()
			if _, _, err := visitor.get("/"); err != nil {
				failed++
				away = time.Since(t0)
				continue
			}
			slowest = max(slowest, time.Since(asked))
		}
		t.Logf("%s died (the database was on %s): of %d pages %d failed, the last after %.1f s; the slowest of the others took %.1f s", dies, db, pages, failed, away.Seconds(), slowest.Seconds())
		if dies != db && failed > 0 {
			t.Errorf("%s died, which had no database: %d of %d pages failed", dies, failed, pages)
		}
		shown(last, file.String(), alive...)
		s.via = 1
		last = s.upload("after-"+dies+".png", file.Bytes())
		shown(last, file.String(), alive...)
		if err := p.Host(k).Plug(); err != nil {
			t.Fatal(err)
		}
		e.boot(k)
		p.healed(1, time.Minute)
		now := at()
		t.Logf("%s is back; the database is on %s", dies, now)
		shown(last, file.String(), 1, 2, 3)
	}

	// The same without a load balancer in the Swarm: nginx itself is at port 80 of every machine.
	dir := filepath.Join(p.Dir, "deploy-wordpress")
	e.docker(1, "stack", "deploy", "--resolve-image", "never", "-c", dir+"/wordpress.yml", "-c", dir+"/wordpress-hostport.yml", "wordpress")
	p.within(3*time.Minute, "nginx answers by itself on every machine", func() error {
		if running, _, err := e.tasks(1, "wordpress_lb"); err == nil || len(running) > 0 {
			return fmt.Errorf("there are load balancers: %+v", running)
		}
		_, nodes, err := e.tasks(1, "wordpress_web")
		if err == nil && len(nodes) != 3 {
			err = fmt.Errorf("nginx is on %v", nodes)
		}
		for via := 1; err == nil && via <= 3; via++ {
			s.via = via
			if _, _, err = s.get("/"); err == nil {
				_, _, err = s.get(last)
			}
		}
		return err
	})
	shown(last, file.String(), 1, 2, 3)
	e.docker(1, "stack", "rm", "wordpress")
	for i := range p.Hosts() {
		e.nothingMounted(i + 1)
	}
	p.identical(1)
}

// TestCompose is WordPress on one machine, as deploy/compose has it and Compose brings it up:
// the same file on the other machine goes on with what the first one had. Two databases on
// the same files do not come to be. MORTAR_TEST_COMPOSE names another Compose than the installed one.
func TestCompose(t *testing.T) {
	if !long {
		t.Skip("LEFT OUT without MORTAR_TEST_LONG=1: WordPress with Compose, and an image of half a gigabyte")
	}
	program := "docker-compose"
	if other := os.Getenv("MORTAR_TEST_COMPOSE"); other != "" {
		program = other
	}
	if _, err := exec.LookPath(program); err != nil {
		t.Skipf("SKIPPED: %v (apt-get install docker-compose)", err)
	}
	p := start(t, setup{hosts: 2, mounts: -1})
	e := startEnginesWith(t, p, "overlay2")
	defer e.stopEngines()
	e.wordpressImages()
	dir := filepath.Join(p.Dir, "compose")
	if err := os.CopyFS(dir, os.DirFS(filepath.Join(deployDir, "compose"))); err != nil {
		t.Fatal(err)
	}
	compose := func(i int, args ...string) string {
		t.Helper()
		return p.run(i, append([]string{"env", "WORDPRESS_DB_PASSWORD=secret", "COMPOSE_PROJECT_NAME=wp", program, "-f", dir + "/wordpress.yml"}, args...)...)
	}
	version := strings.TrimSpace(p.run(1, program, "version", "--short"))
	t.Logf("Compose %s", version)
	s := p.site()
	installed := func(i int, path, want string) {
		t.Helper()
		s.via = i
		p.within(2*time.Minute, fmt.Sprintf("n%d has %s", i, path), func() error {
			text, _, err := s.get(path)
			if err == nil && !strings.Contains(text, want) {
				err = fmt.Errorf("no %q:\n%.1000s", want, text)
			}
			return err
		})
	}
	compose(1, "up", "-d")
	installed(1, "/wp-admin/install.php", "WordPress")
	s.post("/wp-admin/install.php?step=2", url.Values{"weblog_title": {"By Compose"}, "user_name": {"admin"}, "admin_password": {"correct horse battery"},
		"admin_password2": {"correct horse battery"}, "pw_weak": {"1"}, "admin_email": {"admin@example.org"}, "blog_public": {"0"}}, "Success!")
	installed(1, "/", "By Compose")
	for _, v := range []string{"wp_html", "wp_uploads", "wp_db"} {
		if got := e.docker(2, "volume", "inspect", v, "--format", "{{.Driver}}"); got != "mortar" {
			t.Errorf("%s has the driver %q", v, got)
		}
	}

	// The database of the first machine has its files to itself.
	e.docker(2, "run", "-d", "--name", "second", "--network", "none", "-v", "wp_db:/var/lib/mysql", "mariadb:10.11", "--innodb-buffer-pool-size=64M")
	p.within(time.Minute, "a second database on the same files is told so", func() error {
		r, err := p.Host(2).Run(p.ctx(patience), "docker", "logs", "second")
		if err == nil && !strings.Contains(r.Stdout+r.Stderr, "nable to lock") {
			err = fmt.Errorf("%.3000s", r.Stdout+r.Stderr)
		}
		return err
	})
	if log := p.run(2, "docker", "logs", "second"); strings.Contains(log, "ready for connections") {
		t.Errorf("it serves:\n%s", log)
	}
	e.docker(2, "rm", "-f", "second")
	installed(1, "/", "By Compose")

	compose(1, "down")
	e.nothingMounted(1)
	// Version 1 of Compose compares the file with what this very engine was told of the
	// volumes; so there they are volumes that exist, as the README has it.
	volumes := []string{"html", "uploads", "db"}
	if strings.HasPrefix(version, "1.") {
		file := dir + "/wordpress.yml"
		services, _, ok := strings.Cut(readFile(file), "\nvolumes:\n")
		services += "\nvolumes:\n"
		for _, v := range volumes {
			services += "  " + v + ": {name: wp_" + v + ", external: true}\n"
		}
		if err := os.WriteFile(file, []byte(services), 0o644); err != nil || !ok {
			t.Fatal(ok, err)
		}
	}
	compose(2, "up", "-d")
	installed(2, "/", "By Compose")
	compose(2, "down")
	e.nothingMounted(2)
	for _, v := range volumes {
		e.docker(2, "volume", "rm", "wp_"+v)
	}
	for i := range p.Hosts() {
		e.nothingMounted(i + 1)
		if ls := e.docker(i+1, "volume", "ls", "-q"); ls != "" {
			t.Errorf("volume ls on n%d says %q", i+1, ls)
		}
	}
	p.identical(1)
}
