package daemon

import (
	"context"
	"errors"

	"mortar/internal/api"
	"mortar/internal/control/state"
)

// refusals is what the API calls the refusals of the control plane; the others
// are Internal.
var refusals = map[state.Code]api.Code{
	state.CodeBadCommand:     api.Invalid,
	state.CodeNoPool:         api.Conflict,
	state.CodePoolExists:     api.Exists,
	state.CodeConflict:       api.Busy,
	state.CodeBadPeer:        api.Invalid,
	state.CodePeerExists:     api.Exists,
	state.CodeNoPeer:         api.NotFound,
	state.CodePeerInUse:      api.Conflict,
	state.CodeCloned:         api.Cloned,
	state.CodeBadName:        api.Invalid,
	state.CodeVolumeExists:   api.VolumeExists,
	state.CodeNoVolume:       api.NoVolume,
	state.CodeStarted:        api.VolumeStarted,
	state.CodeNotStarted:     api.VolumeStopped,
	state.CodeBadReplica:     api.Invalid,
	state.CodeNotSupported:   api.NotSupported,
	state.CodeBadBrick:       api.Invalid,
	state.CodeBrickPlacement: api.Invalid,
	state.CodeBadOption:      api.Invalid,
	state.CodeStaleEpoch:     api.Busy,
	state.CodeNoToken:        api.Forbidden,
	state.CodeNoLeader:       api.NoQuorum,
	state.CodeDetached:       api.Forbidden,
	state.CodeUnsafe:         api.BrickDown,
	state.CodeInUse:          api.Conflict,
	state.CodeNoDocker:       api.NotFound,
}

// apiError turns an error into one of the API.
func apiError(err error) error {
	if err == nil {
		return nil
	}
	var a *api.Error
	if errors.As(err, &a) {
		return a
	}
	var refusal *state.Error
	if errors.As(err, &refusal) {
		code, ok := refusals[refusal.Code]
		if !ok {
			code = api.Internal
		}
		return api.Errorf(code, "%s", refusal.Text)
	}
	if errors.Is(err, context.DeadlineExceeded) {
		return api.Errorf(api.NoQuorum, "the pool did not decide in time; look at \"mortar peer status\" for peers that are down")
	}
	return api.AsError(err)
}
