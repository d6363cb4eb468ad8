// Package codectest checks types that describe themselves to a codec.Coder. It
// exists for the tests of the packages that define such types, so that all of
// them are held to the same: what is encoded comes back, and nothing that was cut off,
// prolonged or invented is believed.
package codectest

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"reflect"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"mortar/internal/codec"
)

// Fill sets every field reachable from v, a pointer, to something random.
// Strings and byte slices get up to 100 bytes, other slices up to 4 elements.
// special is asked about each value first and says whether it has set it.
func Fill(rng *rand.Rand, v any, special func(v reflect.Value) bool) {
	fill(rng, reflect.ValueOf(v).Elem(), special)
}

func fill(rng *rand.Rand, v reflect.Value, special func(v reflect.Value) bool) {
	if special != nil && special(v) {
		return
	}
	switch v.Kind() {
	case reflect.Bool:
		v.SetBool(rng.IntN(2) == 1)
	case reflect.Int, reflect.Int8, reflect.Int16, reflect.Int32, reflect.Int64:
		v.SetInt(int64(rng.Uint64()))
	case reflect.Uint, reflect.Uint8, reflect.Uint16, reflect.Uint32, reflect.Uint64:
		v.SetUint(rng.Uint64() & (1<<(8*v.Type().Size()) - 1))
	case reflect.String:
		v.SetString(string(random(rng)))
	case reflect.Struct:
		for i := range v.NumField() {
			fill(rng, v.Field(i), special)
		}
	case reflect.Array:
		for i := range v.Len() {
			fill(rng, v.Index(i), special)
		}
	case reflect.Slice:
		if v.Type().Elem().Kind() == reflect.Uint8 {
			v.SetBytes(random(rng))
			return
		}
		v.SetZero()
		for range rng.IntN(5) {
			e := reflect.New(v.Type().Elem()).Elem()
			fill(rng, e, special)
			v.Set(reflect.Append(v, e))
		}
	case reflect.Func: // does not cross the wire
	default:
		panic("codectest: cannot fill a " + v.Type().String())
	}
}

// random is up to 100 bytes, nil for none, as codec.Coder decodes none.
func random(rng *rand.Rand) []byte {
	var b []byte
	for range rng.IntN(101) {
		b = append(b, byte(rng.Uint32()))
	}
	return b
}

// RoundTrip checks that v is what its encoding decodes to, and that no proper
// prefix of the encoding, and nothing longer, decodes at all.
func RoundTrip(t testing.TB, v codec.Coded) {
	t.Helper()
	fresh := func() codec.Coded { return reflect.New(reflect.TypeOf(v).Elem()).Interface().(codec.Coded) }
	b := codec.Append(nil, v)
	got := fresh()
	if err := codec.Decode(bytes.Clone(b), got); err != nil {
		t.Errorf("%T does not decode: %v\n%+v", v, err, v)
		return
	}
	if d := cmp.Diff(v, got); d != "" {
		t.Errorf("%T came back otherwise (-want +got):\n%s", v, d)
	}
	for n := range b {
		if err := codec.Decode(b[:n:n], fresh()); !errors.Is(err, codec.ErrMalformed) {
			t.Errorf("%T: the first %d of %d bytes: %v, want ErrMalformed", v, n, len(b), err)
			return
		}
	}
	if err := codec.Decode(append(b, 0), fresh()); !errors.Is(err, codec.ErrMalformed) {
		t.Errorf("%T with a byte after its end: %v, want ErrMalformed", v, err)
	}
}

// Decode decodes b, which can be anything, into v, a zero value. If that
// succeeds, v must be encodable, into something that decodes to the same encoding.
// The error is that of the first decoding.
func Decode(t testing.TB, b []byte, v codec.Coded) error {
	t.Helper()
	if err := codec.Decode(b, v); err != nil {
		if !errors.Is(err, codec.ErrMalformed) {
			t.Errorf("%T: %v, which is not ErrMalformed", v, err)
		}
		return err
	}
	once := codec.Append(nil, v)
	again := reflect.New(reflect.TypeOf(v).Elem()).Interface().(codec.Coded)
	if err := codec.Decode(once, again); err != nil {
		t.Errorf("%T decoded from %x does not decode again: %v", v, b, err)
		return nil
	}
	if twice := codec.Append(nil, again); !bytes.Equal(once, twice) {
		t.Errorf("%T: the encoding changes from %x to %x", v, once, twice)
	}
	return nil
}

// large is the limit beyond which Limits does not make values that long.
const large = 1<<17 - 1

// Limits checks a bound on a length: limit-1 and limit are encoded and come
// back, limit+1 is not encoded, and refused in what somebody else encoded. set gives v
// that length, and at is where in its encoding the 32-bit length is.
func Limits(t testing.TB, v codec.Coded, limit, at int, set func(n int)) {
	t.Helper()
	fresh := func() codec.Coded { return reflect.New(reflect.TypeOf(v).Elem()).Interface().(codec.Coded) }
	var b []byte
	for _, n := range []int{limit - 1, limit} {
		if limit > large {
			n = 1
		}
		set(n)
		b = codec.Append(nil, v)
		got := fresh()
		if err := codec.Decode(b, got); err != nil {
			t.Errorf("%T with %d: %v", v, n, err)
		} else if !bytes.Equal(codec.Append(nil, got), b) {
			t.Errorf("%T with %d came back otherwise", v, n)
		}
	}
	for _, n := range []uint64{uint64(limit) + 1, 1 << 31, 1<<32 - 1} {
		forged := bytes.Clone(b[:min(len(b), 4096)])
		for i := range 4 {
			forged[at+i] = byte(n >> (8 * i))
		}
		forged = append(forged, make([]byte, 512)...)
		err := codec.Decode(forged, fresh())
		if !errors.Is(err, codec.ErrMalformed) || !strings.Contains(err.Error(), fmt.Sprintf("length %d exceeds %d", n, limit)) {
			t.Errorf("%T with length %d: %v, want ErrMalformed for exceeding %d", v, n, err, limit)
		}
	}
	if limit > large {
		return
	}
	set(limit + 1)
	defer func() {
		if recover() == nil {
			t.Errorf("%T with %d was encoded", v, limit+1)
		}
	}()
	codec.Append(nil, v)
}
