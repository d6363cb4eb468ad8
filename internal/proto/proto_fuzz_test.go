package proto_test

import (
	"math/rand/v2"
	"testing"

	"mortar/internal/codec"
	"mortar/internal/codec/codectest"
	"mortar/internal/proto"
)

// FuzzDecode decodes arbitrary bytes as every message that a frame of a kind
// can have in it.
func FuzzDecode(f *testing.F) {
	rng := rand.New(rand.NewPCG(1, 1))
	for _, k := range kinds {
		for _, m := range k.messages {
			for range 2 {
				v := fresh(m)
				codectest.Fill(rng, v, special(rng))
				var b []byte
				if k.enclosed {
					b = codec.Append(nil, new(proto.Envelope))
				}
				f.Add(k.kind, codec.Append(b, v))
			}
		}
	}
	for _, m := range parts {
		v := fresh(m)
		codectest.Fill(rng, v, special(rng))
		f.Add(uint8(0), codec.Append(nil, v))
	}
	f.Fuzz(func(t *testing.T, kind uint8, b []byte) {
		for _, k := range kinds {
			if k.kind != kind {
				continue
			}
			body := b
			if k.enclosed {
				var err error
				if body, err = codec.DecodePrefix(b, new(proto.Envelope)); err != nil {
					return
				}
			}
			for _, m := range k.messages {
				codectest.Decode(t, body, fresh(m))
			}
			return
		}
		for _, m := range parts {
			codectest.Decode(t, b, fresh(m))
		}
		proto.ParseAnswer(b)
	})
}
