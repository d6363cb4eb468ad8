package api

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strconv"
)

// maxReply bounds what a client reads of an answer, in bytes.
const maxReply = 64 << 20

// ErrConnect is wrapped by errors of a daemon that could not be reached at all.
var ErrConnect = errors.New("cannot connect")

// Client speaks to one daemon. It is safe for concurrent use.
type Client struct {
	base string // scheme and host
	http *http.Client
}

// Unix returns a client of the daemon that listens on a unix socket.
func Unix(path string) *Client {
	return New("http://mortar", func(ctx context.Context) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "unix", path)
	})
}

// New returns a client that gets its connections from dial, which also does the
// TLS handshake where there is one. base is "http://" and the name to send as Host.
func New(base string, dial func(ctx context.Context) (net.Conn, error)) *Client {
	return &Client{base: base, http: &http.Client{Transport: &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			c, err := dial(ctx)
			if err != nil {
				return nil, fmt.Errorf("%w: %w", ErrConnect, err)
			}
			return c, nil
		},
		MaxIdleConns:       2,
		DisableCompression: true,
	}}}
}

// Close lets go of idle connections. The client may be used again.
func (c *Client) Close() { c.http.CloseIdleConnections() }

// call sends in as JSON (nil: no body) and reads the answer into out (nil: dropped).
// What the daemon refuses comes back as an *Error.
func (c *Client) call(ctx context.Context, method, path string, query url.Values, in, out any) error {
	var body io.Reader
	if in != nil {
		raw, err := json.Marshal(in)
		if err != nil {
			return err
		}
		body = bytes.NewReader(raw)
	}
	u := c.base + Prefix + path
	if len(query) > 0 {
		u += "?" + query.Encode()
	}
	req, err := http.NewRequestWithContext(ctx, method, u, body)
	if err != nil {
		return err
	}
	if in != nil {
		req.Header.Set("Content-Type", "application/json")
	}
	resp, err := c.http.Do(req)
	if err != nil {
		var ue *url.Error
		if errors.As(err, &ue) { // its text is the URL, which says nothing to people
			err = ue.Err
		}
		return err
	}
	defer resp.Body.Close()
	raw, err := io.ReadAll(io.LimitReader(resp.Body, maxReply))
	if err != nil {
		return fmt.Errorf("reading the answer to %s %s: %w", method, path, err)
	}
	if resp.StatusCode/100 != 2 {
		var e Error
		if json.Unmarshal(raw, &e) != nil || e.Message == "" {
			return Errorf(Internal, "%s %s: the daemon answered %s", method, path, resp.Status)
		}
		return &e
	}
	if out == nil {
		return nil
	}
	if err := json.Unmarshal(raw, out); err != nil {
		return fmt.Errorf("the answer to %s %s is not what was expected: %w", method, path, err)
	}
	return nil
}

func flag(name string, on bool) url.Values {
	if !on {
		return nil
	}
	return url.Values{name: {strconv.FormatBool(on)}}
}

func volumePath(name string, rest string) string { return "/volumes/" + url.PathEscape(name) + rest }

// Version asks what runs.
func (c *Client) Version(ctx context.Context) (*Version, error) {
	return ask[Version](ctx, c, "GET", "/version", nil, nil)
}

// ask is call with the answer as a result.
func ask[T any](ctx context.Context, c *Client, method, path string, query url.Values, in any) (*T, error) {
	out := new(T)
	if err := c.call(ctx, method, path, query, in, out); err != nil {
		return nil, err
	}
	return out, nil
}

// Pool asks for the pool and its peers.
func (c *Client) Pool(ctx context.Context) (*Pool, error) {
	return ask[Pool](ctx, c, "GET", "/pool", nil, nil)
}

// Invite makes a join token.
func (c *Client) Invite(ctx context.Context, r InviteRequest) (*Invitation, error) {
	return ask[Invitation](ctx, c, "POST", "/pool/invite", nil, r)
}

// Join makes the daemon join another pool.
func (c *Client) Join(ctx context.Context, r JoinRequest) (*JoinReply, error) {
	return ask[JoinReply](ctx, c, "POST", "/pool/join", nil, r)
}

// Leave makes the daemon leave its pool.
func (c *Client) Leave(ctx context.Context) error {
	return c.call(ctx, "POST", "/pool/leave", nil, nil, nil)
}

// Enroll asks a peer of a pool for membership.
func (c *Client) Enroll(ctx context.Context, r EnrollRequest) (*EnrollReply, error) {
	return ask[EnrollReply](ctx, c, "POST", "/pool/enroll", nil, r)
}

// Invited hands an invitation to a fresh machine, which joins before it answers.
func (c *Client) Invited(ctx context.Context, r InvitedRequest) (*JoinReply, error) {
	return ask[JoinReply](ctx, c, "POST", "/pool/invited", nil, r)
}

// Probe brings a fresh machine into the pool.
func (c *Client) Probe(ctx context.Context, r ProbeRequest) (*ProbeReply, error) {
	return ask[ProbeReply](ctx, c, "POST", "/peers", nil, r)
}

// Detach takes a machine out of the pool.
func (c *Client) Detach(ctx context.Context, host string, force bool) error {
	return c.call(ctx, "DELETE", "/peers/"+url.PathEscape(host), flag("force", force), nil, nil)
}

// Drain has a machine hand over what its bricks do, and waits a while for that.
func (c *Client) Drain(ctx context.Context, host string) (*DrainReply, error) {
	return ask[DrainReply](ctx, c, "POST", "/peers/"+url.PathEscape(host)+"/drain", nil, nil)
}

// Undrain has a drained machine take part again.
func (c *Client) Undrain(ctx context.Context, host string) error {
	return c.call(ctx, "DELETE", "/peers/"+url.PathEscape(host)+"/drain", nil, nil, nil)
}

// PoolRecovery tells what recovering the pool on the asked machine would do.
func (c *Client) PoolRecovery(ctx context.Context) (*PoolRecovery, error) {
	return ask[PoolRecovery](ctx, c, "GET", "/pool/recovery", nil, nil)
}

// RecoverPool recovers the pool on the asked machine.
func (c *Client) RecoverPool(ctx context.Context, r PoolRecover) error {
	return c.call(ctx, "POST", "/pool/recovery", nil, r, nil)
}

// Volumes lists all volumes by name.
func (c *Client) Volumes(ctx context.Context) ([]Volume, error) {
	out, err := ask[[]Volume](ctx, c, "GET", "/volumes", nil, nil)
	if err != nil {
		return nil, err
	}
	return *out, nil
}

// Volume describes one volume.
func (c *Client) Volume(ctx context.Context, name string) (*Volume, error) {
	return ask[Volume](ctx, c, "GET", volumePath(name, ""), nil, nil)
}

// CreateVolume makes a volume.
func (c *Client) CreateVolume(ctx context.Context, r VolumeCreate) (*Volume, error) {
	return ask[Volume](ctx, c, "POST", "/volumes", nil, r)
}

// DeleteVolume forgets a stopped volume; its bricks keep the data.
func (c *Client) DeleteVolume(ctx context.Context, name string) error {
	return c.call(ctx, "DELETE", volumePath(name, ""), nil, nil, nil)
}

// StartVolume brings a volume's bricks up.
func (c *Client) StartVolume(ctx context.Context, name string, force bool) error {
	return c.call(ctx, "POST", volumePath(name, "/start"), flag("force", force), nil, nil)
}

// StopVolume takes a volume's bricks down.
func (c *Client) StopVolume(ctx context.Context, name string, force bool) error {
	return c.call(ctx, "POST", volumePath(name, "/stop"), flag("force", force), nil, nil)
}

// VolumeStatus tells how a started volume does; with detail, its disks too.
func (c *Client) VolumeStatus(ctx context.Context, name string, detail bool) (*VolumeStatus, error) {
	return ask[VolumeStatus](ctx, c, "GET", volumePath(name, "/status"), flag("detail", detail), nil)
}

// Options lists every option of a volume with the value in effect.
func (c *Client) Options(ctx context.Context, volume string) ([]Option, error) {
	out, err := ask[[]Option](ctx, c, "GET", volumePath(volume, "/options"), nil, nil)
	if err != nil {
		return nil, err
	}
	return *out, nil
}

// SetOptions sets options of a volume, all or none.
func (c *Client) SetOptions(ctx context.Context, volume string, options []Option) (*OptionsReply, error) {
	return ask[OptionsReply](ctx, c, "PUT", volumePath(volume, "/options"), nil, OptionsChange{options})
}

// ResetOptions takes options back to their defaults; all of them if keys is empty.
func (c *Client) ResetOptions(ctx context.Context, volume string, keys []string) error {
	var ch OptionsChange
	for _, k := range keys {
		ch.Options = append(ch.Options, Option{Key: k})
	}
	return c.call(ctx, "DELETE", volumePath(volume, "/options"), nil, ch, nil)
}

// OptionHelp describes the options that there are.
func (c *Client) OptionHelp(ctx context.Context) ([]OptionHelp, error) {
	out, err := ask[[]OptionHelp](ctx, c, "GET", "/options", nil, nil)
	if err != nil {
		return nil, err
	}
	return *out, nil
}

// HealInfo tells what each brick of a volume lacks.
func (c *Client) HealInfo(ctx context.Context, volume string) (*HealInfo, error) {
	return ask[HealInfo](ctx, c, "GET", volumePath(volume, "/heal"), nil, nil)
}

// Heal starts a heal or a verification, which it waits for.
func (c *Client) Heal(ctx context.Context, volume string, r HealRequest) (*HealReply, error) {
	return ask[HealReply](ctx, c, "POST", volumePath(volume, "/heal"), nil, r)
}

// VolumeRecovery tells what recovering a volume, with that brick if one is named, would do.
func (c *Client) VolumeRecovery(ctx context.Context, volume, brick string) (*VolumeRecovery, error) {
	return ask[VolumeRecovery](ctx, c, "GET", volumePath(volume, "/recovery"), url.Values{"brick": {brick}}, nil)
}

// RecoverVolume does what was agreed to.
func (c *Client) RecoverVolume(ctx context.Context, volume string, r VolumeRecover) error {
	return c.call(ctx, "POST", volumePath(volume, "/recovery"), nil, r, nil)
}

// Subvolumes lists the subvolumes of a volume by name.
func (c *Client) Subvolumes(ctx context.Context, volume string) ([]Subvolume, error) {
	out, err := ask[[]Subvolume](ctx, c, "GET", volumePath(volume, "/subvolumes"), nil, nil)
	if err != nil {
		return nil, err
	}
	return *out, nil
}

func subvolumePath(volume, name string) string {
	return volumePath(volume, "/subvolumes/"+url.PathEscape(name))
}

// Subvolume describes one subvolume.
func (c *Client) Subvolume(ctx context.Context, volume, name string) (*Subvolume, error) {
	return ask[Subvolume](ctx, c, "GET", subvolumePath(volume, name), nil, nil)
}

// CreateSubvolume makes a subvolume.
func (c *Client) CreateSubvolume(ctx context.Context, volume string, r SubvolumeCreate) (*Subvolume, error) {
	return ask[Subvolume](ctx, c, "POST", volumePath(volume, "/subvolumes"), nil, r)
}

// ChangeSubvolume changes limits or the name of a subvolume.
func (c *Client) ChangeSubvolume(ctx context.Context, volume, name string, r SubvolumeChange) (*Subvolume, error) {
	return ask[Subvolume](ctx, c, "PUT", subvolumePath(volume, name), nil, r)
}

// DeleteSubvolume takes the name of a subvolume away; what it has goes in the
// background. Without force a subvolume that is in use stays.
func (c *Client) DeleteSubvolume(ctx context.Context, volume, name string, force bool) error {
	return c.call(ctx, "DELETE", subvolumePath(volume, name), flag("force", force), nil, nil)
}

// LocalSubvolumes asks a peer's own brick.
func (c *Client) LocalSubvolumes(ctx context.Context, r SubvolumeRequest) ([]Subvolume, error) {
	out, err := ask[[]Subvolume](ctx, c, "POST", "/local/subvolumes", nil, r)
	if err != nil {
		return nil, err
	}
	return *out, nil
}

// PrepareBrick checks and makes a brick's directory on the asked peer.
func (c *Client) PrepareBrick(ctx context.Context, r BrickPrepare) error {
	return c.call(ctx, "POST", "/local/bricks", nil, r, nil)
}

// LocalBricks asks a peer about its own bricks of a volume.
func (c *Client) LocalBricks(ctx context.Context, volume string, detail bool) (*LocalBricks, error) {
	q := url.Values{"volume": {volume}}
	if detail {
		q.Set("detail", "true")
	}
	return ask[LocalBricks](ctx, c, "GET", "/local/bricks", q, nil)
}

// Scrub has the bricks of a volume begin a round of scrubbing.
func (c *Client) Scrub(ctx context.Context, volume string) (*ScrubReply, error) {
	return ask[ScrubReply](ctx, c, "POST", volumePath(volume, "/scrub"), nil, nil)
}

// LocalScrub has a peer's own bricks of a volume begin a round of scrubbing.
func (c *Client) LocalScrub(ctx context.Context, volume string) (*ScrubReply, error) {
	return ask[ScrubReply](ctx, c, "POST", "/local/scrub", url.Values{"volume": {volume}}, nil)
}

// LocalRetry has a peer try its own bricks of a volume again that are not served.
func (c *Client) LocalRetry(ctx context.Context, volume string) error {
	return c.call(ctx, "POST", "/local/retry", url.Values{"volume": {volume}}, nil, nil)
}

// LocalVerify asks a peer to compare the sets of a volume whose primary it has.
func (c *Client) LocalVerify(ctx context.Context, volume string) (*HealReply, error) {
	return ask[HealReply](ctx, c, "POST", "/local/verify", url.Values{"volume": {volume}}, nil)
}

// Examine has the daemon, and every peer that it reaches, try to reach all others.
func (c *Client) Examine(ctx context.Context) (*Examination, error) {
	return ask[Examination](ctx, c, "GET", "/pool/examination", nil, nil)
}

// LocalDocker asks a peer how many containers of its machine use a Docker volume.
func (c *Client) LocalDocker(ctx context.Context, name string) (*LocalDocker, error) {
	return ask[LocalDocker](ctx, c, "GET", "/local/docker", url.Values{"name": {name}}, nil)
}

// LocalReach asks a peer whom it reaches.
func (c *Client) LocalReach(ctx context.Context) (*LocalReach, error) {
	return ask[LocalReach](ctx, c, "GET", "/local/reach", nil, nil)
}
