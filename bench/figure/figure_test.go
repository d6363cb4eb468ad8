package figure

import "testing"

func TestMedian(t *testing.T) {
	for _, c := range []struct {
		in   []float64
		want float64
	}{{nil, 0}, {[]float64{3}, 3}, {[]float64{9, 1, 2}, 2}, {[]float64{4, 1, 2, 3}, 2.5}} {
		if got := Median(c.in); got != c.want {
			t.Errorf("Median(%v) = %v, want %v", c.in, got, c.want)
		}
	}
}

func TestNumber(t *testing.T) {
	for v, want := range map[float64]string{12345.6: "12346", 99.96: "100.0", 12.34: "12.3", 1.234: "1.23", 0.01234: "0.0123", 0: "0"} {
		if got := Number(v); got != want {
			t.Errorf("Number(%v) = %s, want %s", v, got, want)
		}
	}
}

func TestTimes(t *testing.T) {
	if a, b := Times("/s", 10, 5), Times("s", 10, 5); a != 2 || b != 0.5 {
		t.Errorf("Times: %v of a rate, %v of a time", a, b)
	}
}
