package disk

import "golang.org/x/sys/unix"

// immutable is FS_IMMUTABLE_FL: not even root changes anything in it.
const immutable = 0x10

// SetImmutable sets or takes back the flag of a directory that is meant as a
// mount point: as long as nothing is mounted there, nobody can put anything in it.
// Not every file system can: ENOTTY or EOPNOTSUPP then.
func SetImmutable(dir string, on bool) error {
	fd, err := unix.Open(dir, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	flags, err := unix.IoctlGetInt(fd, unix.FS_IOC_GETFLAGS)
	if err != nil {
		return err
	}
	if flags&immutable != 0 == on {
		return nil
	}
	return unix.IoctlSetPointerInt(fd, unix.FS_IOC_SETFLAGS, flags^immutable)
}
