package wire

import (
	"net"

	"golang.org/x/sys/unix"
)

// socketBuffer is what a unix socket should hold: a whole large message, so
// that it crosses with one system call and one wake-up on each side. The kernel's
// default is 208 KiB, and unlike TCP it does not adapt.
const socketBuffer = MaxBody

// widen gives a unix socket room for a whole frame, as far as this process may
// have it (more than net.core.wmem_max takes CAP_NET_ADMIN).
func widen(nc net.Conn) {
	u, ok := nc.(*net.UnixConn)
	if !ok {
		return
	}
	rc, err := u.SyscallConn()
	if err != nil {
		return
	}
	_ = rc.Control(func(fd uintptr) {
		if unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_SNDBUFFORCE, socketBuffer) != nil {
			_ = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_SNDBUF, socketBuffer)
		}
	})
}
