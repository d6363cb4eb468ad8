// Package sim puts whole replica sets into one process, for tests and for
// measuring what an operation costs without kernel and network.
package sim
