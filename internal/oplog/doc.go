// Package oplog is a brick's op log: the one place where every change is
// written first, in the order of its position.
package oplog
