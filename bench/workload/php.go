package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"mortar/bench/figure"
)

// phpRoot is where test/wordpress/make puts the tree with WordPress, nginx, PHP and MariaDB.
const phpRoot = "/var/cache/mortar-test/wordpress-root"

// stage gives the programs of the tree a place where only WordPress's files are on the
// file system under test: the database is in memory, for all alike.
const stage = `
mount --bind "$DIR" "$ROOT/var/www/html"
for d in var/lib/mysql run tmp; do mount -t tmpfs tmpfs "$ROOT/$d"; done
mount --bind /dev "$ROOT/dev"
mount -t proc proc "$ROOT/proc"
cp "$DIR.conf" "$ROOT/tmp/nginx.conf"
exec chroot "$ROOT" sh -ec '
	export MARIADB_DATABASE=wordpress MARIADB_USER=wordpress MARIADB_PASSWORD=bench MARIADB_PASSWORD_FILE=
	export WORDPRESS_DB_HOST=127.0.0.1 WORDPRESS_DB_NAME=wordpress WORDPRESS_DB_USER=wordpress WORDPRESS_DB_PASSWORD=bench
	chmod 1777 /tmp
	/test/db --innodb-buffer-pool-size=64M --performance-schema=off --skip-log-bin &
	/test/php &
	nginx -c /tmp/nginx.conf -g "daemon off;" &
	wait'
`

// nginxConf is what stands before PHP.
const nginxConf = `
worker_processes 1;
error_log /dev/stderr crit;
pid /run/nginx.pid;
events { worker_connections 256; }
http {
	include /etc/nginx/mime.types;
	access_log off;
	server {
		listen 127.0.0.1:80;
		root /var/www/html;
		index index.php;
		location / { try_files $uri $uri/ /index.php?$args; }
		location ~ \.php$ {
			include /etc/nginx/fastcgi_params;
			fastcgi_param SCRIPT_FILENAME $document_root$fastcgi_script_name;
			fastcgi_pass 127.0.0.1:9000;
		}
	}
}
`

// php measures pages of a WordPress whose files are on the file system under test.
func (b *bench) php() (err error) {
	if _, err := os.Stat(phpRoot + "/test/php"); err != nil {
		fmt.Fprintf(os.Stderr, "workload: no pages of WordPress: %s is not there; test/wordpress/make makes it\n", phpRoot)
		return nil
	}
	dir := filepath.Join(b.dir, "html")
	if err := errors.Join(os.Mkdir(dir, 0o755), os.WriteFile(dir+".conf", []byte(nginxConf), 0o644)); err != nil {
		return err
	}
	var said bytes.Buffer
	cmd := exec.Command("unshare", "--mount", "--pid", "--fork", "--kill-child", "sh", "-ec", stage)
	cmd.Env = append(os.Environ(), "DIR="+dir, "ROOT="+phpRoot)
	cmd.Stdout, cmd.Stderr = &said, &said
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		return err
	}
	defer func() {
		cmd.Process.Kill()
		cmd.Wait()
		if err != nil {
			err = fmt.Errorf("%w\n%s", err, said.Bytes())
		}
	}()
	client := &http.Client{Timeout: time.Minute}
	page := func(path, want string) error {
		resp, err := client.Get("http://127.0.0.1" + path)
		if err != nil {
			return err
		}
		defer resp.Body.Close()
		text, err := io.ReadAll(resp.Body)
		if err == nil && (resp.StatusCode != http.StatusOK || !strings.Contains(string(text), want)) {
			err = fmt.Errorf("%s: %s, without %q: %.500s", path, resp.Status, want, text)
		}
		return err
	}
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(100 * time.Millisecond) {
		if err = page("/wp-admin/install.php", "Welcome"); err == nil {
			break
		}
		if time.Now().After(deadline) {
			return err
		}
	}
	resp, err := client.PostForm("http://127.0.0.1/wp-admin/install.php?step=2", url.Values{"weblog_title": {"Bench"}, "user_name": {"admin"},
		"admin_password": {"bench"}, "admin_password2": {"bench"}, "pw_weak": {"1"}, "admin_email": {"admin@example.org"}})
	if err != nil {
		return err
	}
	if err := resp.Body.Close(); err != nil {
		return err
	}
	get := func(int) error { return page("/", "Hello world!") }
	if err := workers(4, 40, get); err != nil { // every process of PHP has seen it
		return err
	}
	// What goes over the network by itself is not the pages'.
	const rest = 5 * time.Second
	before := networkBytes()
	time.Sleep(rest)
	idle := float64(networkBytes()-before) / rest.Seconds()
	n := b.n(400)
	before, begin := networkBytes(), time.Now()
	if err := b.rate("WordPress page, php-fpm", "/s", float64(n), func() error { return workers(4, n, get) }); err != nil {
		return err
	}
	b.note("WordPress page, php-fpm, network", "B", (float64(networkBytes()-before)-idle*time.Since(begin).Seconds())/float64(n))
	if err := b.dropCaches(); err != nil {
		return err
	}
	return b.time("WordPress page, php-fpm, cold", func() error { return get(0) })
}

// note keeps a figure that is no time.
func (b *bench) note(name, unit string, value float64) {
	for _, f := range b.figures {
		if f.Name == name {
			f.Rounds = append(f.Rounds, value)
			return
		}
	}
	b.figures = append(b.figures, &figure.Figure{Name: name, Unit: unit, Rounds: []float64{value}})
}

// networkBytes are those that the machine's network device has carried so far, in both
// directions (proc(5), /proc/net/dev); the machine's own traffic with itself is not among them.
func networkBytes() (sum int64) {
	raw, err := os.ReadFile("/proc/net/dev")
	if err != nil {
		return 0
	}
	for line := range strings.Lines(string(raw)) {
		name, rest, ok := strings.Cut(line, ":")
		f := strings.Fields(rest)
		if !ok || strings.TrimSpace(name) == "lo" || len(f) < 9 {
			continue
		}
		for _, i := range []int{0, 8} { // received, sent
			n, _ := strconv.ParseInt(f[i], 10, 64)
			sum += n
		}
	}
	return sum
}
