package e2e

import (
	"archive/zip"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"mortar/test/cluster"
	"mortar/test/tree"
)

// The programs that people run, as Debian has them, with their data in the
// volume. It takes minutes and some large packages, so it takes part in the long
// form only; a program that is not installed is named.
func TestSoftware(t *testing.T) {
	if !long {
		t.Skip("LEFT OUT without MORTAR_TEST_LONG=1: rsync, unzip, npm, make, git, stress-ng, dbench, fio, PostgreSQL and MariaDB in the volume")
	}
	p := start(t, setup{disk: cluster.XFS, diskBytes: 4 << 30})
	src := tree.WordPress()
	if src == "" {
		src = filepath.Join(t.TempDir(), "wordpress")
		if err := tree.Make(src, 1); err != nil {
			t.Fatal(err)
		}
	}
	from := src
	src = filepath.Join(p.Dir, "src")
	p.run(1, "sh", "-ec", "cp -a "+from+" "+src+"; find "+src+" -type l -delete") // what zip cannot hold
	archive := filepath.Join(p.Dir, "src.zip")
	if err := zipTree(archive, src); err != nil {
		t.Fatal(err)
	}

	// Each is a script for machine 1 in a directory of its own, and one that looks at the outcome from machine 2.
	for _, c := range []struct {
		name, needs string
		script      string
		look        string
		limit       time.Duration
	}{
		{name: "rsync", needs: "rsync",
			script: `chown -R 33:33 $SRC/wp-content; ln -f $SRC/index.php $SRC/hard-link; setfattr -n user.mortar.test -v x $SRC/index.php || true
				rsync -aHAX $SRC/ copy/; touch $SRC/index.php; rsync -aHAX --delete $SRC/ copy/; rsync -aHAX copy/ again/`,
			look: `test -z "$(rsync -aHAXnc --delete --itemize-changes $SRC/ again/ | tee /dev/stderr)"; rm $SRC/hard-link`},
		{name: "unzip", needs: "unzip",
			script: `unzip -q $ZIP -d out; unzip -q -o $ZIP -d out`,
			look:   `diff -r $SRC out`},
		{name: "git", needs: "git",
			script: `export GIT_AUTHOR_NAME=t GIT_AUTHOR_EMAIL=t@example.org GIT_COMMITTER_NAME=t GIT_COMMITTER_EMAIL=t@example.org
				mkdir repo; cd repo; git init -q -b main; cp -r $SRC/wp-includes .; git add -A -f; git commit -q -m one
				git worktree add -q ../tree -b other; cd ../tree; echo changed > wp-includes/version.php; git commit -q -a -m two
				cd ../repo; git merge -q other; git gc -q; git repack -q -a -d -f; git worktree remove ../tree; git clone -q . ../clone`,
			look: `git config --global --add safe.directory '*'; for r in repo clone; do git -C $r fsck --full --strict 2>&1; test -z "$(git -C $r status --short)"; done; test "$(cat clone/wp-includes/version.php)" = changed`},
		{name: "npm", needs: "npm", limit: 5 * time.Minute,
			// No registry is within reach: the dependencies are packed here.
			script: `export HOME=$PWD npm_config_cache=$PWD/.cache npm_config_audit=false npm_config_fund=false npm_config_update_notifier=false
				for k in $(seq 20); do mkdir -p dep$k/lib; echo "{\"name\":\"dep$k\",\"version\":\"1.0.$k\",\"main\":\"lib/index.js\"}" > dep$k/package.json
					for m in $(seq 20); do echo "exports.m$m = $k * $m" > dep$k/lib/m$m.js; done; echo "module.exports = require('./m$k').m$k" > dep$k/lib/index.js
					(cd dep$k && npm pack --silent --pack-destination ..); done
				mkdir app; cd app; echo '{"name":"app","version":"1.0.0"}' > package.json; npm install --offline --silent ../dep*.tgz`,
			look: `cd app; for k in $(seq 20); do test $(node -e "console.log(require('dep$k'))") = $((k * k)); done`},
		{name: "make", needs: "make", limit: 5 * time.Minute,
			script: `for k in $(seq 60); do printf '#include "all.h"\nint f%d(int x) { return x + %d; }\n' $k $k > f$k.c; done
				for k in $(seq 60); do echo "int f$k(int);"; done > all.h
				{ echo '#include <stdio.h>'; echo '#include "all.h"'; echo 'int main(void) { int x = 0;'; for k in $(seq 60); do echo "x = f$k(x);"; done; echo 'printf("%d\n", x); return 0; }'; } > main.c
				printf 'OBJ := $(patsubst %%.c,%%.o,$(wildcard *.c))\nprog: $(OBJ)\n\tgcc -o $@ $^\n%%.o: %%.c all.h\n\tgcc -O1 -c -o $@ $<\nclean:\n\trm -f *.o prog\n' > Makefile
				make -s -j4; make -s clean; make -s -j4; make -q; touch f7.c; ! make -q; make -s -j4`,
			look: `make -q; test $(./prog) = 1830`},
		{name: "sqlite3 WAL", needs: "sqlite3",
			script: `sqlite3 db 'PRAGMA journal_mode=WAL; CREATE TABLE t(id INTEGER PRIMARY KEY, v)' > /dev/null
				for w in 1 2 3 4; do (for k in $(seq 100); do sqlite3 -cmd '.timeout 60000' db "INSERT INTO t(v) VALUES($w)"; done) & done; wait`,
			look: `test "$(sqlite3 db 'PRAGMA wal_checkpoint(TRUNCATE); PRAGMA integrity_check; SELECT count(*) FROM t' | tail -2 | tr '\n' ' ')" = "ok 400 "`},
		{name: "fio --verify", needs: "fio", limit: 5 * time.Minute,
			script: `fio --name=v --directory=. --rw=randrw --bsrange=512-128k --size=64m --numjobs=2 --verify=crc32c --verify_fatal=1 --do_verify=1 --end_fsync=1 --output=fio.txt`,
			look:   `grep -c 'err= 0' fio.txt`},
		{name: "dbench", needs: "dbench", limit: 5 * time.Minute,
			script: `dbench -t 20 -D . 4 > dbench.txt || { cat dbench.txt; exit 1; }`,
			look:   `grep Throughput dbench.txt`},
		{name: "stress-ng", needs: "stress-ng", limit: 15 * time.Minute,
			script: `stress-ng --class filesystem --seq 1 --timeout 4 --verify --temp-path . --exclude ` + strings.Join(stressOthers, ",") + ` > ../stress-ng.txt 2>&1 || { grep -vE 'dispatching|completed|skipped' ../stress-ng.txt; exit 1; }`,
			look:   `grep -c . ../stress-ng.txt`},
	} {
		t.Run(c.name, func(t *testing.T) {
			need(t, c.needs)
			p.as(t)
			dir := "/mnt/wp/" + strings.ReplaceAll(c.name, " ", "-")
			p.run(1, "mkdir", dir)
			prefix := "cd " + dir + "; SRC=" + src + " ZIP=" + archive + "\n"
			begin := time.Now()
			if _, err := p.Host(1).Run(p.ctx(max(c.limit, 2*time.Minute)), "bash", "-ec", prefix+c.script); err != nil {
				t.Fatal(err)
			}
			t.Logf("took %.1f s", time.Since(begin).Seconds())
			if out, err := p.Host(2).Run(p.ctx(2*time.Minute), "bash", "-ec", prefix+c.look); err != nil {
				t.Fatal(err)
			} else if out.Stdout != "" {
				t.Log(strings.TrimSpace(out.Stdout))
			}
			p.run(3, "rm", "-r", dir)
			p.identical(1)
		})
	}
	for _, db := range []database{postgres, mariadb} {
		t.Run(db.name, func(t *testing.T) {
			p.as(t)
			p.survives(db)
		})
	}
}

// stressOthers are stress-ng's stressors of the class that have nothing to do with the file system at
// hand, or are of the machine.
var stressOthers = []string{"binderfs", "ramfs", "sysfs", "procfs", "dev", "loop"}

// database is one that keeps its data in a directory.
type database struct {
	name  string
	needs string                    // a program, by its path
	make  string                    // script: makes $DIR, empty, a database directory
	serve string                    // script: execs the server in the foreground
	sql   func(query string) string // script: runs a query and prints the values
	bench string                    // script: a benchmark of writes, 10 s
}

var postgres = database{
	name: "PostgreSQL", needs: "/usr/lib/postgresql/15/bin/postgres",
	make: `chown postgres $DIR; chmod 700 $DIR; cd $DIR; setpriv --reuid=postgres --clear-groups $BIN/initdb -D $DIR --no-locale -A trust > /dev/null`,
	// A machine's death leaves postmaster.pid behind; its process numbers mean nothing on another machine.
	serve: `cd $DIR; rm -f postmaster.pid; exec setpriv --reuid=postgres --clear-groups $BIN/postgres -D $DIR -k /tmp -c listen_addresses= -c shared_buffers=16MB`,
	sql: func(q string) string {
		return `$BIN/psql -h /tmp -U postgres -v ON_ERROR_STOP=1 -qtA postgres -c "` + q + `"`
	},
	bench: `$BIN/pgbench -h /tmp -U postgres -i -q -s 2 postgres 2> /dev/null; $BIN/pgbench -h /tmp -U postgres -c 4 -j 2 -T 10 postgres 2>&1 | grep -E 'tps|failed'`,
}

var mariadb = database{
	name: "MariaDB", needs: "/usr/sbin/mariadbd",
	make:  `chown mysql $DIR; cd $DIR; mariadb-install-db --no-defaults --user=mysql --datadir=$DIR --skip-test-db --auth-root-authentication-method=normal > /dev/null`,
	serve: `exec /usr/sbin/mariadbd --no-defaults --user=mysql --datadir=$DIR --socket=/tmp/maria.sock --skip-networking --pid-file=/tmp/maria.pid --innodb-buffer-pool-size=32M`,
	sql: func(q string) string {
		return `mariadb --no-defaults --socket=/tmp/maria.sock -uroot -N -B -e "CREATE DATABASE IF NOT EXISTS d; USE d; ` + q + `"`
	},
	bench: `S="sysbench oltp_write_only --mysql-socket=/tmp/maria.sock --mysql-user=root --mysql-db=d --tables=2 --table-size=2000 --threads=4 --time=10"
		$S prepare > /dev/null; $S run | grep -E 'transactions:|errors:'`,
}

// survives runs a database on one machine, kills every process of the machine that has the
// primary under it, and then every process of its own machine: it starts on another, and no
// transaction that it said was committed is missing.
func (p *pool) survives(db database) {
	p.t.Helper()
	if _, err := os.Stat(db.needs); err != nil {
		p.t.Skipf("SKIPPED: %s is not installed", db.needs)
	}
	dir := "/mnt/wp/" + db.name
	prefix := "set -e; DIR=" + dir + " BIN=" + filepath.Dir(db.needs) + "; "
	sh := func(i int, script string) (cluster.Result, error) {
		return p.Host(i).Run(p.ctx(2*time.Minute), "bash", "-c", prefix+script)
	}
	must := func(i int, script string) string {
		p.t.Helper()
		r, err := sh(i, script)
		if err != nil {
			p.t.Fatalf("%v\n%s", err, p.Host(i).Log(db.name))
		}
		return strings.TrimSpace(r.Stdout)
	}
	serve := func(i int) *cluster.Process {
		p.t.Helper()
		server, err := p.Host(i).Spawn(db.name, "bash", "-c", prefix+db.serve)
		if err != nil {
			p.t.Fatal(err)
		}
		p.within(time.Minute, db.name+" answers", func() error {
			select {
			case <-server.Done():
				p.t.Fatalf("%s ended:\n%s", db.name, p.Host(i).Log(db.name))
			default:
			}
			_, err := sh(i, db.sql("SELECT 1"))
			return err
		})
		return server
	}
	primary := p.primary(1)
	here := p.other(primary)
	next := p.other(primary, here)
	must(here, "mkdir $DIR; "+db.make)
	serve(here)
	must(here, db.sql("CREATE TABLE acked (id INT PRIMARY KEY)"))
	p.t.Log(must(here, db.bench))

	// insert commits until it is refused, and returns the last number that was acknowledged.
	insert := func(from int, until <-chan struct{}) int {
		for n := from; ; n++ {
			select {
			case <-until:
				return n - 1
			default:
			}
			if _, err := sh(here, db.sql("INSERT INTO acked VALUES ("+strconv.Itoa(n)+")")); err != nil {
				return n - 1
			}
		}
	}
	count := func(i, acked int) {
		p.t.Helper()
		got := must(i, db.sql("SELECT COUNT(*) FROM acked WHERE id <= "+strconv.Itoa(acked)))
		if got != strconv.Itoa(acked) || acked < 20 {
			p.t.Errorf("%s of %d acknowledged rows are there", got, acked)
		}
	}
	until, done := make(chan struct{}), make(chan int, 1)
	go func() { done <- insert(1, until) }()
	p.within(20*time.Second, "rows are committed", p.rows(sh, here, db, 20))
	if err := p.Host(primary).KillAll(); err != nil {
		p.t.Fatal(err)
	}
	n, err := strconv.Atoi(must(here, db.sql("SELECT COUNT(*) FROM acked")))
	if err != nil {
		p.t.Fatal(err)
	}
	p.within(20*time.Second, "rows are committed without the primary's machine", p.rows(sh, here, db, n+20))
	close(until)
	acked := <-done
	count(here, acked)
	p.run(primary, "umount", "/mnt/wp")
	p.back(primary)
	p.mount(primary)
	p.healed(here, time.Minute)

	// And now its own machine, while it works.
	until, done = make(chan struct{}), make(chan int, 1)
	go func() { done <- insert(acked+1, until) }()
	p.within(20*time.Second, "rows are committed", p.rows(sh, here, db, acked+20))
	if err := p.Host(here).KillAll(); err != nil {
		p.t.Fatal(err)
	}
	close(until)
	acked = <-done
	server := serve(next)
	count(next, acked)
	p.t.Logf("%d acknowledged rows survived", acked)
	server.Signal(syscall.SIGINT) // PostgreSQL: at once, but orderly
	server.Signal(syscall.SIGTERM)
	if err := server.Wait(p.ctx(time.Minute)); err != nil {
		p.t.Errorf("%s, asked to end: %v", db.name, err)
	}
	p.run(here, "umount", "/mnt/wp")
	p.back(here)
	p.mount(here)
	p.healed(next, time.Minute)
	p.identical(next)
	p.run(next, "rm", "-r", dir)
}

// rows is whether the database has at least so many rows.
func (p *pool) rows(sh func(int, string) (cluster.Result, error), i int, db database, want int) func() error {
	return func() error {
		r, err := sh(i, db.sql("SELECT COUNT(*) FROM acked"))
		if err != nil {
			return err
		}
		if n, err := strconv.Atoi(strings.TrimSpace(r.Stdout)); err != nil || n < want {
			return fmt.Errorf("%s of %d rows", strings.TrimSpace(r.Stdout), want)
		}
		return nil
	}
}

// zipTree packs a tree.
func zipTree(archive, dir string) error {
	f, err := os.Create(archive)
	if err != nil {
		return err
	}
	defer f.Close()
	z := zip.NewWriter(f)
	if err := z.AddFS(os.DirFS(dir)); err != nil {
		return err
	}
	return z.Close()
}
