package cli

import (
	"context"
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"mortar/internal/api"
	"mortar/internal/cli/ui"
)

func newVolumeStatus(a *app) *cobra.Command {
	return verb("status [all | <VOLNAME> [<BRICK>]] [detail]", "display status of all or specified volume(s)/brick", 0, 3,
		func(ctx context.Context, args []string) error {
			args, detail := flagged(args, "detail")
			brick := ""
			if len(args) == 2 {
				brick = args[1]
				if !strings.Contains(brick, ":/") {
					return &usageError{text: fmt.Sprintf("%s is neither a brick (HOST:/path) nor the word detail", brick)}
				}
			}
			return a.ask(ctx, usual, func(ctx context.Context, c *api.Client) error {
				return a.volumeStatus(ctx, c, args, brick, detail)
			})
		})
}

func (a *app) volumeStatus(ctx context.Context, c *api.Client, args []string, brick string, detail bool) error {
	one := len(args) > 0 && args[0] != "all"
	vs, err := a.volumes(ctx, c, args[:min(len(args), 1)])
	if err != nil {
		return err
	}
	all := []*api.VolumeStatus{}
	for _, v := range vs {
		st, err := c.VolumeStatus(ctx, v.Name, detail)
		if api.IsCode(err, api.VolumeStopped) && !one {
			a.Errorf("%s", err) // and the others' status
			continue
		}
		if err != nil {
			return err
		}
		if brick != "" {
			st.Bricks = keep(st.Bricks, brick)
			st.Peers = nil
			if len(st.Bricks) == 0 {
				return api.Errorf(api.NotFound, "No brick %s in volume %s", brick, v.Name)
			}
		}
		all = append(all, st)
	}
	return a.Show(all, func() {
		if len(vs) == 0 {
			a.Printf("No volumes present")
		}
		for _, st := range all {
			if detail {
				a.statusDetail(st)
			} else {
				a.statusTable(st)
			}
		}
	})
}

func keep(bricks []api.BrickStatus, name string) []api.BrickStatus {
	for _, b := range bricks {
		if b.Name == name {
			return []api.BrickStatus{b}
		}
	}
	return nil
}

// The shape of gluster's status table.
const (
	processWidth = 43
	ruleWidth    = 78
)

var rule = strings.Repeat("-", ruleWidth)

func (a *app) statusTable(st *api.VolumeStatus) {
	a.Printf("Status of volume: %s", st.Name)
	a.Printf("%-*s %s", processWidth, "Gluster process", "TCP Port  RDMA Port  Online  Pid")
	a.Printf("%s", rule)
	for _, b := range st.Bricks {
		a.statusRow("Brick "+b.Name, b.Online, b.Port, b.PID)
	}
	for _, p := range st.Peers {
		a.statusRow("Self-heal Daemon on "+p.Host, p.Online, 0, p.PID)
	}
	for _, p := range st.Peers {
		a.statusRow("NFS Server on "+p.Host, false, 0, 0)
	}
	a.Printf(" ")
	a.Printf("Task Status of Volume %s", st.Name)
	a.Printf("%s", rule)
	a.Printf("There are no active volume tasks")
	a.Printf(" ")
	for _, s := range st.Sets {
		if s.Problem != "" {
			a.Errorf("Set %d of %s: %s.", s.Index, st.Name, s.Problem)
		}
	}
	for _, b := range st.Bricks {
		if b.Problem != "" {
			a.Errorf("Brick %s: %s", b.Name, b.Problem)
		}
		if b.Scrub != nil && b.Scrub.Rotten > 0 {
			a.Errorf("Brick %s: %d blocks have rotted and are not repaired: \"volume scrub %s status\" names them", b.Name, b.Scrub.Rotten, st.Name)
		}
	}
}

// statusRow prints one process: the name in lines of processWidth, then the
// columns behind the last of them.
func (a *app) statusRow(process string, online bool, port, pid int) {
	for len(process) > processWidth {
		a.Printf("%s", process[:processWidth])
		process = process[processWidth:]
	}
	pidText := "N/A"
	if online && pid > 0 {
		pidText = fmt.Sprint(pid)
	}
	mark := 'N'
	if online {
		mark = 'Y'
	}
	if online && port > 0 {
		a.Printf("%-*s %-10d%-11d%-8c%-5s", processWidth, process, port, 0, mark, pidText)
		return
	}
	a.Printf("%-*s %-10s%-11s%-8c%-5s", processWidth, process, "N/A", "N/A", mark, pidText)
}

func (a *app) statusDetail(st *api.VolumeStatus) {
	a.Printf("Status of volume: %s", st.Name)
	line := func(key, format string, v ...any) { a.Printf("%-20s : %-20s", key, fmt.Sprintf(format, v...)) }
	for _, b := range st.Bricks {
		a.Printf("%s", rule)
		line("Brick", "Brick %s", b.Name)
		if b.Online {
			line("TCP Port", "%d", b.Port)
			line("RDMA Port", "0")
			line("Online", "Y")
			line("Pid", "%d", b.PID)
		} else {
			line("TCP Port", "N/A")
			line("RDMA Port", "N/A")
			line("Online", "N")
			line("Pid", "N/A")
		}
		if d := b.Disk; d != nil {
			line("File System", "%s", d.FileSystem)
			line("Device", "%s", d.Device)
			line("Mount Options", "%s", d.MountOptions)
			if d.InodeSize > 0 {
				line("Inode Size", "%d", d.InodeSize)
			} else {
				line("Inode Size", "N/A")
			}
			line("Disk Space Free", "%s", ui.Bytes(d.Free))
			line("Total Disk Space", "%s", ui.Bytes(d.Total))
			line("Inode Count", "%d", d.Inodes)
			line("Free Inodes", "%d", d.FreeInodes)
		}
		line("Role", "%s", b.Role)
		if b.Online {
			line("Position", "%d.%d", b.Epoch, b.Tail)
			line("Acknowledged", "%d", b.Commit)
		}
		if b.Problem != "" {
			line("Problem", "%s", b.Problem)
		}
		if h := b.Heal; h != nil {
			line("Heal", "%s", healText(h))
		}
		if s := b.Scrub; s != nil {
			line("Scrub", "%s, %.1f%%; blocks found rotten %d, repaired %d, rotten now %d", s.State, s.Percent, s.Found, s.Repaired, s.Rotten)
		}
	}
	a.Printf(" ")
}
