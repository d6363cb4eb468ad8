package main

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"syscall"
	"time"
)

// mariadbd is the server, which has no business in a PATH on some systems.
const mariadbd = "/usr/sbin/mariadbd"

// db measures the writing transactions of sysbench on a MariaDB whose data is on the file
// system under test. Every commit is flushed, which is MariaDB's default.
func (b *bench) db() (err error) {
	for _, program := range []string{mariadbd, "mariadb-install-db", "mariadb-admin", "sysbench"} {
		if _, err := exec.LookPath(program); err != nil {
			fmt.Fprintf(os.Stderr, "workload: no database: %s is not installed (apt-get install mariadb-server sysbench)\n", program)
			return nil
		}
	}
	dir, socket := filepath.Join(b.dir, "db"), filepath.Join(b.tmp, "db.sock")
	if err := os.Mkdir(dir, 0o700); err != nil {
		return err
	}
	if err := program("mariadb-install-db", "--no-defaults", "--user=root", "--datadir="+dir, "--skip-test-db", "--auth-root-authentication-method=normal"); err != nil {
		return err
	}
	var said bytes.Buffer
	server := exec.Command(mariadbd, "--no-defaults", "--user=root", "--datadir="+dir, "--socket="+socket, "--skip-networking",
		"--pid-file="+filepath.Join(b.tmp, "db.pid"), "--innodb-buffer-pool-size=64M")
	server.Stdout, server.Stderr = &said, &said
	server.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := server.Start(); err != nil {
		return err
	}
	ended := make(chan struct{})
	go func() {
		server.Wait()
		close(ended)
	}()
	defer func() {
		server.Process.Signal(syscall.SIGTERM)
		select {
		case <-ended:
		case <-time.After(time.Minute):
			server.Process.Kill()
			<-ended
			err = errors.Join(err, errors.New("mariadbd did not end within a minute"))
		}
		if err != nil {
			err = fmt.Errorf("%w\n%s", err, said.Bytes())
		}
	}()
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(100 * time.Millisecond) {
		if err = program("mariadb-admin", "--no-defaults", "--socket="+socket, "-uroot", "create", "bench"); err == nil {
			break
		}
		select {
		case <-ended:
			return err
		default:
		}
		if time.Now().After(deadline) {
			return err
		}
	}
	for _, threads := range []int{1, 4} {
		sysbench := func(do string) ([]byte, error) {
			cmd := exec.Command("sysbench", "oltp_write_only", "--mysql-socket="+socket, "--mysql-user=root", "--mysql-db=bench", "--tables=4", "--table-size=10000",
				"--threads="+strconv.Itoa(threads), "--time="+strconv.Itoa(b.n(10)), "--rand-seed=1", do)
			out, err := cmd.CombinedOutput()
			if err != nil {
				err = fmt.Errorf("sysbench %s: %w: %s", do, err, out)
			}
			return out, err
		}
		if _, err := sysbench("prepare"); err != nil {
			return err
		}
		out, err := sysbench("run")
		if err != nil {
			return err
		}
		m := perSecond.FindSubmatch(out)
		if m == nil {
			return fmt.Errorf("sysbench does not say how many transactions it made: %s", out)
		}
		rate, err := strconv.ParseFloat(string(m[1]), 64)
		if err != nil {
			return err
		}
		name := "MariaDB, sysbench write-only"
		if threads > 1 {
			name += fmt.Sprintf(", %d threads", threads)
		}
		b.note(name, "/s", rate)
		if _, err := sysbench("cleanup"); err != nil {
			return err
		}
	}
	return nil
}

// perSecond is sysbench's line on transactions.
var perSecond = regexp.MustCompile(`transactions:\s+\d+\s+\(([0-9.]+) per sec`)
