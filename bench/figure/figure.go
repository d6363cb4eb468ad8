// Package figure has what the benchmark programs say to each other: the figure
// that a workload measured.
package figure

import (
	"slices"
	"strconv"
)

// Figure is what one workload measured.
type Figure struct {
	Name string `json:"name"`
	// Unit is "/s" or "MB/s", of which more is better, or "s" or "B", of which less is.
	Unit   string    `json:"unit"`
	Rounds []float64 `json:"rounds"`
	Median float64   `json:"median"`
	// CPU is the median of the processor time that the whole machine spent, in
	// milliseconds per operation; per MB or per run where the unit is MB/s or s.
	CPU       float64   `json:"cpu_ms,omitempty"`
	CPURounds []float64 `json:"cpu_ms_rounds,omitempty"`
}

// Times is how many times as good a is as b, in a unit.
func Times(unit string, a, b float64) float64 {
	if a <= 0 || b <= 0 { // nothing has no multiples
		return 0
	}
	if unit == "s" || unit == "B" {
		return b / a
	}
	return a / b
}

// Median is the middle of some values, or the mean of the two in the middle;
// 0 of none.
func Median(v []float64) float64 {
	if len(v) == 0 {
		return 0
	}
	s := slices.Sorted(slices.Values(v))
	if n := len(s); n%2 == 0 {
		return (s[n/2-1] + s[n/2]) / 2
	}
	return s[len(s)/2]
}

// Number prints the three digits that count.
func Number(v float64) string {
	switch {
	case v >= 100:
		return strconv.FormatFloat(v, 'f', 0, 64)
	case v >= 10:
		return strconv.FormatFloat(v, 'f', 1, 64)
	}
	return strconv.FormatFloat(v, 'g', 3, 64)
}
