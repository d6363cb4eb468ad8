package fsop

import (
	"bytes"
	"reflect"
	"testing"
)

// The list u::rwx,u:1000:rw-,g::r-x,m::rwx,o::---.
func anACL() ACL {
	return ACL{{Tag: ACLUserObj, Perm: 7}, {Tag: ACLUser, Perm: 6, ID: 1000}, {Tag: ACLGroupObj, Perm: 5}, {Tag: ACLMask, Perm: 7}, {Tag: ACLOther}}
}

func TestACL(t *testing.T) {
	v := anACL().Append(nil)
	if got, err := ParseACL(v); err != nil || !reflect.DeepEqual(got[1], anACL()[1]) || !bytes.Equal(got.Append(nil), v) {
		t.Errorf("got %v, %v, want %v", got, err, anACL())
	}
	if mode, simple := anACL().Mode(); mode != 0o770 || simple {
		t.Errorf("mode %o, simple %v", mode, simple)
	}
	plain := ACL{{Tag: ACLUserObj, Perm: 6}, {Tag: ACLGroupObj, Perm: 4}, {Tag: ACLOther, Perm: 1}}
	if mode, simple := plain.Mode(); mode != 0o641 || !simple {
		t.Errorf("mode %o, simple %v", mode, simple)
	}

	a := anACL()
	a.Chmod(0o142)
	if a[0].Perm != 1 || a[1].Perm != 6 || a[2].Perm != 5 || a[3].Perm != 4 || a[4].Perm != 2 {
		t.Errorf("after chmod 142: %v", a)
	}
	a = anACL()
	if mode := a.Inherit(0o642); mode != 0o640 || a[3].Perm != 4 || a[2].Perm != 5 || a[1].Perm != 6 {
		t.Errorf("inherited with 642: mode %o, %v", mode, a)
	}
	plain.Chmod(0o750)
	if mode, _ := plain.Mode(); mode != 0o750 {
		t.Errorf("after chmod 750: %o", mode)
	}
}

func TestNoACL(t *testing.T) {
	for _, v := range [][]byte{nil, ACL{}.Append(nil)} {
		if a, err := ParseACL(v); len(a) != 0 || err != nil {
			t.Errorf("%x: %v, %v", v, a, err)
		}
	}
	whole := anACL().Append(nil)
	bad := map[string][]byte{
		"short":       {2, 0, 0},
		"version":     append([]byte{1}, whole[1:]...),
		"cut":         whole[:len(whole)-1],
		"no others":   whole[:len(whole)-8],
		"no mask":     append(append([]byte{}, whole[:4+3*8]...), whole[4+4*8:]...),
		"disorder":    append(append(append([]byte{}, whole[:4]...), whole[12:20]...), append(whole[4:12:12], whole[20:]...)...),
		"owner twice": append(append([]byte{}, whole[:12]...), whole[4:]...),
		"permission":  append(append([]byte{}, whole[:6]...), append([]byte{8}, whole[7:]...)...),
		"tag":         append(append([]byte{}, whole[:4]...), append([]byte{64}, whole[5:]...)...),
	}
	for name, v := range bad {
		if a, err := ParseACL(v); err != EINVAL {
			t.Errorf("%s: %v, %v, want %v", name, a, err, EINVAL)
		}
	}
}

func FuzzACL(f *testing.F) {
	f.Add([]byte(nil))
	f.Add(ACL{}.Append(nil))
	f.Add(anACL().Append(nil))
	f.Fuzz(func(t *testing.T, v []byte) {
		a, err := ParseACL(v)
		if err != nil || len(a) == 0 {
			return
		}
		again, err := ParseACL(a.Append(nil))
		if err != nil {
			t.Fatalf("%v is not read again: %v", a, err)
		}
		was, _ := a.Mode()
		if mode := again.Inherit(0o777); mode != was {
			t.Errorf("%v: inherited with 777: %o, want %o", a, mode, was)
		}
	})
}
