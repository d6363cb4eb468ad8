// Package sim runs a replica set, its control plane and its clients in one
// goroutine, from one seed, by the million steps, and checks after every step
// what must always be true. doc/simulation.md says what is simulated and what is
// left out.
//
// The machines are the real ones, replica/core and control/state. What stands
// around them in a daemon (package replica, brick, client, control) is modelled
// here, small and without goroutines: a brick is a log with a durable part and a
// key-value store with rare flushes, the file system is a few registers, and the
// network a table of connections.
//
//	world    events in order of a time that nobody in it can see
//	plan     what happens from outside: faults, and what clients ask for
//	network  messages
//	plane    the control plane's leader, and who hears what of its decisions
//	brick    a machine, its disk, and the shell around the machine
//	client   a session: home, window, cache and lease
//	oracle   sees everything and judges it
package sim
