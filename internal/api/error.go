package api

import (
	"errors"
	"fmt"
	"maps"
	"net/http"
	"slices"
)

// Code is a kind of failure that survives the wire. The list is closed: each
// code has one HTTP status and one number, which for failures that the gluster
// command has too is the opErrno of its XML output.
type Code string

const (
	Invalid       Code = "invalid"         // the request makes no sense as it stands
	Forbidden     Code = "forbidden"       // the caller may not do this
	NotFound      Code = "not_found"       // no such thing, other than the ones below
	Exists        Code = "exists"          // there is one already, other than a volume
	Conflict      Code = "conflict"        // the state changed in between, or does not allow it; look and try again
	NoQuorum      Code = "no_quorum"       // the pool cannot decide anything now
	Internal      Code = "internal"        // mortar's own failure
	NotSupported  Code = "not_supported"   // this version has no such thing
	Busy          Code = "busy"            // somebody else changes the same thing
	BrickDown     Code = "brick_down"      // a brick that is needed does not serve
	NodeDown      Code = "node_down"       // a peer that is needed does not answer
	NoVolume      Code = "no_volume"       // no volume of that name
	VolumeStarted Code = "volume_started"  // the volume must be stopped first
	VolumeStopped Code = "volume_stopped"  // the volume must be started first
	VolumeExists  Code = "volume_exists"   // the name is taken
	Unavailable   Code = "unavailable"     // the daemon is starting or stopping
	TooLarge      Code = "too_large"       // the request's body exceeds the limit
	Method        Code = "method"          // the path exists, the method does not
	Cloned        Code = "cloned_identity" // two live machines have this peer's identity
)

// codes is the one table from a Code to what other worlds call it.
var codes = map[Code]struct{ status, errno int }{
	Invalid:       {http.StatusBadRequest, 22},
	Forbidden:     {http.StatusForbidden, 13},
	NotFound:      {http.StatusNotFound, 2},
	Exists:        {http.StatusConflict, 17},
	Conflict:      {http.StatusConflict, 11},
	NoQuorum:      {http.StatusServiceUnavailable, 30800},
	Internal:      {http.StatusInternalServerError, 30800},
	NotSupported:  {http.StatusNotImplemented, 30801},
	Busy:          {http.StatusConflict, 30802},
	BrickDown:     {http.StatusServiceUnavailable, 30803},
	NodeDown:      {http.StatusServiceUnavailable, 30804},
	NoVolume:      {http.StatusNotFound, 30806},
	VolumeStarted: {http.StatusConflict, 30809},
	VolumeStopped: {http.StatusConflict, 30810},
	VolumeExists:  {http.StatusConflict, 30811},
	Unavailable:   {http.StatusServiceUnavailable, 30800},
	TooLarge:      {http.StatusRequestEntityTooLarge, 7},
	Method:        {http.StatusMethodNotAllowed, 30801},
	Cloned:        {http.StatusConflict, 30800},
}

// Error is a failure as the API tells it: what, where, and what to do next.
type Error struct {
	Code Code `json:"code"`
	// Errno is gluster's op_errno, or the errno that fits; derived from Code.
	Errno   int    `json:"op_errno"`
	Message string `json:"message"`
}

func (e *Error) Error() string { return e.Message }

// Status is the HTTP status of the error.
func (e *Error) Status() int {
	if c, ok := codes[e.Code]; ok {
		return c.status
	}
	return http.StatusInternalServerError
}

// Errorf makes an Error. With %w in format the cause stays in the text only:
// an Error ends at the API.
func Errorf(code Code, format string, args ...any) *Error {
	return &Error{Code: code, Errno: codes[code].errno, Message: fmt.Errorf(format, args...).Error()}
}

// AsError returns the Error in err's chain, or err as an Internal one.
func AsError(err error) *Error {
	var e *Error
	if errors.As(err, &e) {
		return e
	}
	return Errorf(Internal, "%w", err)
}

// IsCode reports whether err is an Error with that code.
func IsCode(err error, code Code) bool {
	var e *Error
	return errors.As(err, &e) && e.Code == code
}

// Codes lists all codes, sorted.
func Codes() []Code { return slices.Sorted(maps.Keys(codes)) }
