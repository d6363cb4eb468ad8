// Package ui is how the command line talks to people and to scripts: text or
// its JSON twin on standard output, talk on standard error, questions only
// where somebody can answer them.
package ui

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"strings"
	"sync"
	"time"
	"unicode"

	"golang.org/x/sys/unix"
)

// UI is one command's conversation.
type UI struct {
	In  io.Reader
	Out io.Writer // answers
	Err io.Writer // errors, questions, progress
	// JSON makes Show print values in place of text.
	JSON bool
	// Script answers every question with yes, as gluster's --mode=script does.
	Script bool
}

// Show prints the answer of a command: v as JSON, or what text prints.
func (u *UI) Show(v any, text func()) error {
	if !u.JSON {
		text()
		return nil
	}
	e := json.NewEncoder(u.Out)
	e.SetIndent("", "  ")
	e.SetEscapeHTML(false)
	return e.Encode(v)
}

// Printf prints a line of the answer; the line end is added.
func (u *UI) Printf(format string, args ...any) {
	fmt.Fprintf(u.Out, format+"\n", args...)
}

// Errorf prints a line on standard error; the line end is added.
func (u *UI) Errorf(format string, args ...any) {
	fmt.Fprintf(u.Err, "%s\n", Clean(fmt.Sprintf(format, args...)))
}

// Confirm asks a question until it is answered with y or n. Where nobody can
// answer (script mode, or standard input is no terminal) the answer is yes.
func (u *UI) Confirm(question string) (bool, error) {
	if u.Script || !IsTerminal(u.In) {
		return true, nil
	}
	return u.ask(question)
}

// Agree asks a question that nobody else may answer: where nobody can, it is an
// error, and words say what would have answered it on the command line.
func (u *UI) Agree(question, words string) (bool, error) {
	if u.Script || !IsTerminal(u.In) {
		return false, fmt.Errorf("nothing was done: nobody can be asked here whether to go on. To go on, repeat the command with the words %s at its end", words)
	}
	return u.ask(question)
}

func (u *UI) ask(question string) (bool, error) {
	in := bufio.NewReader(u.In)
	for {
		fmt.Fprintf(u.Err, "%s (y/n) ", question)
		line, err := in.ReadString('\n')
		switch strings.ToLower(strings.TrimSpace(line)) {
		case "y", "yes":
			return true, nil
		case "n", "no":
			return false, nil
		}
		if err != nil {
			return false, fmt.Errorf("no answer to %q: %w", question, err)
		}
		fmt.Fprintln(u.Err, "Invalid input, please enter y/n")
	}
}

// Clean makes text from elsewhere safe for a terminal: control characters,
// other than line ends and tabs, are shown and not sent.
func Clean(s string) string {
	if strings.IndexFunc(s, unsafe) < 0 {
		return s
	}
	var b strings.Builder
	for _, r := range s {
		if unsafe(r) {
			fmt.Fprintf(&b, "\\x%02x", r)
		} else {
			b.WriteRune(r)
		}
	}
	return b.String()
}

func unsafe(r rune) bool { return unicode.IsControl(r) && r != '\n' && r != '\t' }

// IsTerminal reports whether f, a reader or writer, is a terminal.
func IsTerminal(f any) bool {
	file, ok := f.(*os.File)
	if !ok {
		return false
	}
	_, err := unix.IoctlGetTermios(int(file.Fd()), unix.TCGETS)
	return err == nil
}

// Table prints rows under a head, columns as wide as they need to be.
func (u *UI) Table(head []string, rows [][]string) {
	width := make([]int, len(head))
	for _, row := range append([][]string{head}, rows...) {
		for i, cell := range row {
			width[i] = max(width[i], len([]rune(cell)))
		}
	}
	line := func(row []string) {
		var b strings.Builder
		for i, cell := range row {
			if i > 0 {
				b.WriteString("  ")
			}
			b.WriteString(cell)
			if i < len(row)-1 {
				b.WriteString(strings.Repeat(" ", width[i]-len([]rune(cell))))
			}
		}
		fmt.Fprintln(u.Out, Clean(b.String()))
	}
	line(head)
	for _, row := range rows {
		line(row)
	}
}

// While runs work and, on a terminal, shows what status says of it four times a
// second, on a line that is gone when work ends.
func (u *UI) While(status func() string, work func() error) error {
	if u.JSON || !IsTerminal(u.Err) {
		return work()
	}
	done := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		tick := time.NewTicker(250 * time.Millisecond)
		defer tick.Stop()
		for {
			select {
			case <-done:
				fmt.Fprint(u.Err, "\r\x1b[K")
				return
			case <-tick.C:
				if s := status(); s != "" {
					fmt.Fprintf(u.Err, "\r\x1b[K%s", Clean(s))
				}
			}
		}
	})
	err := work()
	close(done)
	wg.Wait()
	return err
}

// Bytes writes a number of bytes for people: 1536 is "1.5KB". The units are
// those of gluster: powers of 1024 called KB, MB, GB and so on.
func Bytes(n uint64) string {
	const units = "KMGTPE"
	if n < 1024 {
		return fmt.Sprintf("%dBytes", n)
	}
	v, i := float64(n)/1024, 0
	for v >= 1024 && i < len(units)-1 {
		v /= 1024
		i++
	}
	return fmt.Sprintf("%.1f%cB", v, units[i])
}

// Duration writes seconds for people: "1m20s"; "unknown" if negative.
func Duration(seconds float64) string {
	if seconds < 0 {
		return "unknown"
	}
	return time.Duration(seconds * float64(time.Second)).Round(time.Second).String()
}
