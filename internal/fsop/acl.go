package fsop

import "encoding/binary"

// Names of the extended attributes that are POSIX access control lists, in the
// form that Linux gives them between kernel and programs.
const (
	XattrACL        = "system.posix_acl_access"
	XattrDefaultACL = "system.posix_acl_default"
)

// ACL is an access control list (acl(5)), its entries in the order that Linux
// demands: owner, users, group, groups, mask, others.
type ACL []ACLEntry

// ACLEntry says what one user or group, or one of a file's three classes, may.
type ACLEntry struct {
	Tag  uint16
	Perm uint16 // 4 read, 2 write, 1 execute
	ID   uint32 // of ACLUser and ACLGroup
}

// Tags of an entry.
const (
	ACLUserObj  uint16 = 1
	ACLUser     uint16 = 2
	ACLGroupObj uint16 = 4
	ACLGroup    uint16 = 8
	ACLMask     uint16 = 16
	ACLOther    uint16 = 32
)

const (
	aclVersion = 2
	aclNoID    = 1<<32 - 1
)

// ParseACL reads an attribute's value. A value without entries is a nil ACL.
func ParseACL(v []byte) (ACL, error) {
	le := binary.LittleEndian
	if len(v) == 0 {
		return nil, nil
	}
	if len(v) < 4 || (len(v)-4)%8 != 0 || le.Uint32(v) != aclVersion {
		return nil, EINVAL
	}
	var a ACL
	for v = v[4:]; len(v) > 0; v = v[8:] {
		a = append(a, ACLEntry{Tag: le.Uint16(v), Perm: le.Uint16(v[2:]), ID: le.Uint32(v[4:])})
	}
	if len(a) > 0 && !a.valid() {
		return nil, EINVAL
	}
	return a, nil
}

// valid says whether the list has each of the three classes once, its entries in
// order, and a mask if it names anybody.
func (a ACL) valid() bool {
	var seen, last uint16
	for _, e := range a {
		switch e.Tag {
		case ACLUserObj, ACLGroupObj, ACLMask, ACLOther:
			if e.Tag <= last {
				return false
			}
		case ACLUser, ACLGroup:
			if e.Tag < last {
				return false
			}
		default:
			return false
		}
		if e.Perm&^7 != 0 {
			return false
		}
		seen |= e.Tag
		last = e.Tag
	}
	const classes = ACLUserObj | ACLGroupObj | ACLOther
	named := seen&(ACLUser|ACLGroup) != 0
	return seen&classes == classes && (!named || seen&ACLMask != 0)
}

// Append appends the attribute's value to b.
func (a ACL) Append(b []byte) []byte {
	le := binary.LittleEndian
	b = le.AppendUint32(b, aclVersion)
	for _, e := range a {
		id := e.ID
		if e.Tag&(ACLUser|ACLGroup) == 0 {
			id = aclNoID
		}
		b = le.AppendUint16(b, e.Tag)
		b = le.AppendUint16(b, e.Perm)
		b = le.AppendUint32(b, id)
	}
	return b
}

// Mode is the permission bits that show a file with this list: those of the
// group are the mask's, if there is one. With simple they say all of it.
func (a ACL) Mode() (mode uint32, simple bool) {
	simple = true
	var mask *ACLEntry
	for i, e := range a {
		switch e.Tag {
		case ACLUserObj:
			mode |= uint32(e.Perm) << 6
		case ACLGroupObj:
			mode |= uint32(e.Perm) << 3
		case ACLOther:
			mode |= uint32(e.Perm)
		case ACLMask:
			mask = &a[i]
		}
		simple = simple && e.Tag&(ACLUser|ACLGroup|ACLMask) == 0
	}
	if mask != nil {
		mode = mode&^0o070 | uint32(mask.Perm)<<3
	}
	return mode, simple
}

// Chmod changes the list to what chmod makes of it.
func (a ACL) Chmod(mode uint32) { a.each(func(p *uint16, shift int) { *p = uint16(mode>>shift) & 7 }) }

// Inherit changes a directory's default list to the access list of something new
// in the directory that was asked for with mode, and returns its permission bits.
func (a ACL) Inherit(mode uint32) uint32 {
	a.each(func(p *uint16, shift int) { *p &= uint16(mode>>shift) & 7 })
	perm, _ := a.Mode()
	return perm
}

// each calls f with the entries that stand for the three classes.
func (a ACL) each(f func(perm *uint16, shift int)) {
	group := ACLGroupObj
	for _, e := range a {
		if e.Tag == ACLMask {
			group = ACLMask
		}
	}
	for i := range a {
		switch e := &a[i]; e.Tag {
		case ACLUserObj:
			f(&e.Perm, 6)
		case group:
			f(&e.Perm, 3)
		case ACLOther:
			f(&e.Perm, 0)
		}
	}
}
