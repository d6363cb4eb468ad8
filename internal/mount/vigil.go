package mount

import "time"

// vigilTime is how long the mount goes on looking for the next request before it sleeps.
const vigilTime = 50 * time.Microsecond

// maxUnkept bounds how often it sleeps at once after vigils in vain: what they cost a mount
// whose requests never come so soon is bounded with it.
const maxUnkept = 63

// vigil decides whether to go on looking for the next request, in place of sleeping until it comes.
//
// Programs ask in bursts: an open is followed by its close, a stat by the next one, microseconds
// later. To be woken for a request costs more than to serve it from memory, twice: whoever asks wakes
// the mount, and the mount is switched to (doc/decisions/0048).
type vigil struct {
	vain   int // how often to sleep at once after the next one in vain
	unkept int // how often still
}

// begins says whether to keep one now.
func (v *vigil) begins() bool {
	if v.unkept > 0 {
		v.unkept--
		return false
	}
	return true
}

// ended is told whether a request came.
func (v *vigil) ended(came bool) {
	if came {
		v.vain = 0
		return
	}
	v.vain = min(2*v.vain+1, maxUnkept)
	v.unkept = v.vain
}
