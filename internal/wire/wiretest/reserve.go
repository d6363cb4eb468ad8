// Package wiretest gives tests addresses to listen at.
package wiretest

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"
)

// Reserve returns an address of this machine, with a port, that nobody else is given before release is called, also while
// nobody listens there: a socket has it that takes no connections.
func Reserve() (addr string, release func(), err error) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return "", nil, err
	}
	// Whoever asks for this very address gets it.
	err = errors.Join(unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1),
		unix.Bind(fd, &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}))
	is, nerr := unix.Getsockname(fd)
	if err = errors.Join(err, nerr); err != nil {
		unix.Close(fd)
		return "", nil, err
	}
	return fmt.Sprint("127.0.0.1:", is.(*unix.SockaddrInet4).Port), func() { unix.Close(fd) }, nil
}
