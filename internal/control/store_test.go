package control

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/hashicorp/raft"
	"pgregory.net/rapid"
)

func entries(from, n uint64, term uint64) []*raft.Log {
	var logs []*raft.Log
	for i := range n {
		logs = append(logs, &raft.Log{Index: from + i, Term: term, Type: raft.LogCommand, Data: fmt.Appendf(nil, "command %d of term %d", from+i, term)})
	}
	return logs
}

func mustOpen(t testing.TB, dir string) *store {
	t.Helper()
	s, err := openStore(dir, func(err error) { t.Errorf("failed: %v", err) })
	if err != nil {
		t.Fatalf("open: %v", err)
	}
	return s
}

// content is everything a store holds, as text.
func content(s *store) string {
	var b strings.Builder
	first, _ := s.FirstIndex()
	last, _ := s.LastIndex()
	fmt.Fprintf(&b, "%d to %d\n", first, last)
	for i := first; i <= last && i > 0; i++ {
		var l raft.Log
		if err := s.GetLog(i, &l); err != nil {
			return err.Error()
		}
		fmt.Fprintf(&b, "%d %d %d %s %s\n", l.Index, l.Term, l.Type, l.Data, l.Extensions)
	}
	for _, k := range []string{"CurrentTerm", "LastVoteTerm", "LastVoteCand", forgetfulKey} {
		v, err := s.Get([]byte(k))
		fmt.Fprintf(&b, "%s %x %v\n", k, v, err)
	}
	return b.String()
}

func TestStoreKeepsEverything(t *testing.T) {
	dir := t.TempDir()
	s := mustOpen(t, dir)
	if !s.forgetful() {
		t.Error("an empty store is not marked")
	}
	check := func(what string) {
		t.Helper()
		want := content(s)
		s.close()
		s = mustOpen(t, dir)
		if got := content(s); got != want {
			t.Fatalf("%s: reopened\n%s\nwas\n%s", what, got, want)
		}
	}
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	check("empty")
	must(s.SetUint64([]byte("CurrentTerm"), 7))
	must(s.Set([]byte("LastVoteCand"), []byte("somebody")))
	must(s.StoreLogs(entries(1, 5, 1)))
	must(s.StoreLog(&raft.Log{Index: 6, Term: 2, Type: raft.LogConfiguration, Data: []byte("x"), Extensions: []byte("y")}))
	check("entries")
	must(s.DeleteRange(4, 6))
	check("suffix cut")
	must(s.StoreLogs(entries(4, 3, 3)))
	check("written over")
	must(s.DeleteRange(1, 2))
	check("prefix cut")
	if err := s.StoreLogs(entries(9, 1, 3)); err == nil {
		t.Error("a gap was taken")
	}
	if err := s.DeleteRange(4, 5); err == nil {
		t.Error("the middle was deleted")
	}
	must(s.DeleteRange(1, 100))
	check("all cut")
	must(s.StoreLogs(entries(100, 2, 4)))
	check("begun anew elsewhere")
	var l raft.Log
	for _, i := range []uint64{0, 99, 102} {
		if err := s.GetLog(i, &l); !errors.Is(err, raft.ErrLogNotFound) {
			t.Errorf("entry %d: %v", i, err)
		}
	}
	if _, err := s.GetUint64([]byte("nothing")); err == nil || err.Error() != "not found" {
		t.Errorf("an absent value: %v", err) // the consensus library compares this text
	}
	s.close()
	if err := s.StoreLogs(entries(102, 1, 4)); err == nil {
		t.Error("a closed store takes entries")
	}
}

func TestStoreHasOneOwner(t *testing.T) {
	dir := t.TempDir()
	s := mustOpen(t, dir)
	defer s.close()
	if _, err := openStore(dir, nil); err == nil || !strings.Contains(err.Error(), "in use") {
		t.Errorf("opened twice: %v", err)
	}
	if _, err := Discard(dir); err == nil || !strings.Contains(err.Error(), "in use") {
		t.Errorf("discarded in use: %v", err)
	}
}

// TestStoreModel runs random operations against a plain map and slice.
func TestStoreModel(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		dir, err := os.MkdirTemp("", "control-store-")
		if err != nil {
			t.Fatal(err)
		}
		defer os.RemoveAll(dir)
		s, err := openStore(dir, nil)
		if err != nil {
			t.Fatal(err)
		}
		defer func() { s.close() }()
		term := uint64(1)
		for range rapid.IntRange(1, 25).Draw(t, "operations") {
			first, _ := s.FirstIndex()
			last, _ := s.LastIndex()
			switch rapid.IntRange(0, 5).Draw(t, "operation") {
			case 0, 1:
				err = s.StoreLogs(entries(last+1, uint64(rapid.IntRange(1, 4).Draw(t, "entries")), term))
			case 2:
				if first > 0 {
					err = s.DeleteRange(uint64(rapid.IntRange(int(first), int(last)).Draw(t, "from")), last)
					term++
				}
			case 3:
				if first > 0 {
					err = s.DeleteRange(first, uint64(rapid.IntRange(int(first), int(last)).Draw(t, "to")))
				}
			case 4:
				err = s.SetUint64([]byte("CurrentTerm"), term)
			case 5:
				want := content(s)
				s.close()
				if s, err = openStore(dir, nil); err == nil && content(s) != want {
					t.Fatalf("reopened\n%s\nwas\n%s", content(s), want)
				}
			}
			if err != nil {
				t.Fatal(err)
			}
		}
	})
}

// filled makes a store with some records and returns its file, and where its
// records end.
func filled(t testing.TB, dir string) (file string, want string, end int64) {
	t.Helper()
	s := mustOpen(t, dir)
	for i := range uint64(4) {
		if err := s.StoreLogs(entries(1+3*i, 3, 1+i)); err != nil {
			t.Fatal(err)
		}
		if err := s.SetUint64([]byte("CurrentTerm"), 1+i); err != nil {
			t.Fatal(err)
		}
	}
	want, end = content(s), s.off
	s.close()
	return filepath.Join(dir, "log.mortar"), want, end
}

// TestStoreDamage flips every byte of a store: it is refused by name, or the
// damage was of no consequence. It is never taken for something else.
func TestStoreDamage(t *testing.T) {
	dir := t.TempDir()
	file, want, end := filled(t, dir)
	good, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	for _, cut := range []int64{0, 5, 16, 100, end - 1, end, end + 1, 4096} {
		if err := os.WriteFile(file, good[:cut], 0o600); err != nil {
			t.Fatal(err)
		}
		var damage *DamageError
		if _, err := openStore(dir, nil); !errors.As(err, &damage) {
			t.Fatalf("cut at %d: %v", cut, err)
		}
	}
	for at := range int(end) {
		bad := bytes.Clone(good[:end+4096])
		bad[at] ^= 1 << (at % 8)
		s := &store{path: file, values: map[string][]byte{}}
		_, err := s.parse(bad)
		if err == nil {
			t.Fatalf("byte %d flipped, and it opens with\n%s\nfor\n%s", at, content(s), want)
		}
		var damage *DamageError
		if !errors.As(err, &damage) || !strings.Contains(err.Error(), file) || !strings.Contains(err.Error(), "move the directory "+dir) {
			if at < 8 || at > 11 { // the format version: another clear error
				t.Fatalf("byte %d flipped: %v", at, err)
			}
		}
	}
	// Behind the records only zeros are expected.
	bad := bytes.Clone(good)
	bad[end+2000] = 1
	if err := os.WriteFile(file, bad, 0o600); err != nil {
		t.Fatal(err)
	}
	s, err := openStore(dir, nil)
	if err != nil {
		t.Fatalf("a stray byte in the room that was never written: %v", err)
	}
	if got := content(s); got != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
	s.close()
}

// TestStoreTorn cuts the last append short in every way a crash can: what was
// there before is there, and the store goes on.
func TestStoreTorn(t *testing.T) {
	dir := t.TempDir()
	file, want, end := filled(t, dir)
	s := mustOpen(t, dir)
	big := entries(13, 20, 9) // over several sectors
	if err := s.StoreLogs(big); err != nil {
		t.Fatal(err)
	}
	after, full := s.off, content(s)
	s.close()
	whole, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	try := func(what string, b []byte) {
		t.Helper()
		if err := os.WriteFile(file, b, 0o600); err != nil {
			t.Fatal(err)
		}
		s, err := openStore(dir, nil)
		if err != nil {
			t.Fatalf("%s: %v", what, err)
		}
		if got := content(s); got != want {
			t.Fatalf("%s: got\n%s\nwant\n%s", what, got, want)
		}
		// It can be written again, with something shorter, and read.
		if err := s.StoreLogs(entries(13, 1, 10)); err != nil {
			t.Fatal(err)
		}
		now := content(s)
		s.close()
		s = mustOpen(t, dir)
		if got := content(s); got != now {
			t.Fatalf("%s: after another append got\n%s\nwant\n%s", what, got, now)
		}
		s.close()
	}
	try("nothing of it was written", append(bytes.Clone(whole[:end]), make([]byte, storeChunk-end)...))
	rng := rand.New(rand.NewPCG(1, 2))
	for i := range 60 { // sectors reach the disk in any order
		b := bytes.Clone(whole)
		lost := false
		for from := end; from < after; from = (from/512 + 1) * 512 {
			if rng.IntN(2) == 0 {
				clear(b[from:min((from/512+1)*512, after)])
				lost = true
			}
		}
		if lost {
			try(fmt.Sprintf("sectors lost, %d", i), b)
		}
	}
	if err := os.WriteFile(file, whole, 0o600); err != nil {
		t.Fatal(err)
	}
	s = mustOpen(t, dir)
	defer s.close()
	if got := content(s); got != full {
		t.Errorf("whole: got\n%s\nwant\n%s", got, full)
	}
}

func TestStoreOtherVersion(t *testing.T) {
	dir := t.TempDir()
	s := mustOpen(t, dir)
	s.close()
	file := filepath.Join(dir, "log.mortar")
	if err := os.WriteFile(file, []byte("something else entirely"), 0o600); err != nil {
		t.Fatal(err)
	}
	_, err := openStore(dir, nil)
	var damage *DamageError
	if !errors.As(err, &damage) {
		t.Errorf("not a store: %v", err)
	}
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err = openStore(dir, nil); !errors.As(err, &damage) {
		t.Errorf("an empty file: %v", err)
	}
}

// TestStorePoison: after a failed write nothing more is written, the owner is
// told, and whoever would have made a promise is held until all is cut.
func TestStorePoison(t *testing.T) {
	dir := t.TempDir()
	failed := make(chan error, 1)
	s, err := openStore(dir, func(err error) { failed <- err })
	if err != nil {
		t.Fatal(err)
	}
	s.f.Close() // every write fails from now on
	if err := s.StoreLogs(entries(1, 1, 1)); err == nil {
		t.Fatal("written to a closed file")
	}
	if err := <-failed; !strings.Contains(err.Error(), "log.mortar") {
		t.Errorf("the owner is told: %v", err)
	}
	if err := s.StoreLogs(entries(1, 1, 1)); err == nil {
		t.Fatal("written after a failure")
	}
	held := make(chan struct{})
	go func() {
		_ = s.SetUint64([]byte("CurrentTerm"), 2)
		close(held)
	}()
	select {
	case <-held:
		t.Fatal("a term that is not stored was promised")
	default:
	}
	s.release()
	<-held
	s.close()
}

func FuzzStoreParse(f *testing.F) {
	dir := f.TempDir()
	file, _, end := filled(f, dir)
	b, err := os.ReadFile(file)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b[:end+100])
	f.Add(b[:end-3])
	f.Add(b[:16])
	f.Fuzz(func(t *testing.T, b []byte) {
		b = append(b, make([]byte, 1024)...)
		s := &store{path: "log.mortar", values: map[string][]byte{}}
		end, err := s.parse(b)
		if err != nil {
			return
		}
		// What was believed is whole: without the rest it is the same.
		clear(b[end:])
		again := &store{path: "log.mortar", values: map[string][]byte{}}
		if end2, err := again.parse(b); err != nil || end2 != end || content(again) != content(s) {
			t.Fatalf("parsed to %d, then to %d: %v", end, end2, err)
		}
	})
}
