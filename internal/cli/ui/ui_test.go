package ui

import (
	"bytes"
	"strings"
	"testing"
)

func TestConfirm(t *testing.T) {
	for _, c := range []struct {
		name, input string
		want, fails bool
		talk        string
	}{
		{"yes", "y\n", true, false, "Sure? (y/n) "},
		{"no", "No\n", false, false, "Sure? (y/n) "},
		{"nonsense first", "maybe\nyes\n", true, false, "Sure? (y/n) Invalid input, please enter y/n\nSure? (y/n) "},
		{"nobody there", "", false, true, "Sure? (y/n) "},
		{"no line end", "y", true, false, "Sure? (y/n) "},
	} {
		t.Run(c.name, func(t *testing.T) {
			var talk bytes.Buffer
			u := &UI{In: strings.NewReader(c.input), Err: &talk}
			got, err := u.ask("Sure?")
			if got != c.want || (err != nil) != c.fails || talk.String() != c.talk {
				t.Errorf("got %v, %v, talk %q; want %v, error %v, talk %q", got, err, talk.String(), c.want, c.fails, c.talk)
			}
		})
	}
	// Nobody can answer a pipe: yes, and no question is printed.
	var talk bytes.Buffer
	u := &UI{In: strings.NewReader("n\n"), Err: &talk}
	if yes, err := u.Confirm("Sure?"); !yes || err != nil || talk.Len() != 0 {
		t.Errorf("Confirm without a terminal = %v, %v, talk %q; want yes in silence", yes, err, talk.String())
	}
}

func TestTable(t *testing.T) {
	var out bytes.Buffer
	u := &UI{Out: &out}
	u.Table([]string{"NAME", "STATE"}, [][]string{{"größer", "up"}, {"b", "down\x1b[2J"}})
	want := "NAME    STATE\ngrößer  up\nb       down\\x1b[2J\n"
	if out.String() != want {
		t.Errorf("got %q, want %q", out.String(), want)
	}
}

func TestShow(t *testing.T) {
	var out bytes.Buffer
	u := &UI{Out: &out}
	text := func() { u.Printf("n is %d", 3) }
	v := struct {
		N string `json:"n"`
	}{"<3>"}
	if err := u.Show(v, text); err != nil || out.String() != "n is 3\n" {
		t.Errorf("text: %v, %q", err, out.String())
	}
	out.Reset()
	u.JSON = true
	if err := u.Show(v, text); err != nil || out.String() != "{\n  \"n\": \"<3>\"\n}\n" {
		t.Errorf("json: %v, %q", err, out.String())
	}
}

func TestBytes(t *testing.T) {
	for n, want := range map[uint64]string{
		0: "0Bytes", 1023: "1023Bytes", 1024: "1.0KB", 1536: "1.5KB", 5 << 30: "5.0GB", 1<<64 - 1: "16.0EB",
	} {
		if got := Bytes(n); got != want {
			t.Errorf("Bytes(%d) = %s, want %s", n, got, want)
		}
	}
}
