package state

import (
	"errors"
	"testing"

	"mortar/internal/cluster"
)

// TestDockerLife: a Docker volume is made, removed and forgotten step by step,
// and each step is refused when it is not the next.
func TestDockerLife(t *testing.T) {
	s := New()
	sc := &script{t: t, s: s}
	for _, line := range []string{"init n1", "create v replica=1 n1:/a"} {
		sc.line(line)
	}
	d := cluster.DockerVolume{ID: cluster.ID{1}, Name: "demo", Volume: volumeID("v"), Dir: "demo", Own: true, Mode: 0o755}
	put := func(edit func(*cluster.DockerVolume), want Code) {
		t.Helper()
		c := d
		edit(&c)
		err := s.Apply(Command{PutDocker: &PutDocker{Volume: c}})
		var e *Error
		errors.As(err, &e)
		if err == nil && want != "" || err != nil && (e == nil || e.Code != want) {
			t.Fatalf("got %v, want %q", err, want)
		}
	}
	to := func(st cluster.DockerState) func(*cluster.DockerVolume) {
		return func(d *cluster.DockerVolume) { d.State = st }
	}
	drop := func(id cluster.ID) error { return s.Apply(Command{DropDocker: &DropDocker{Name: "demo", ID: id}}) }

	put(to(cluster.DockerRemoving), CodeConflict)
	put(func(d *cluster.DockerVolume) { d.State, d.Dir = cluster.DockerMaking, "../x" }, CodeBadName)
	put(func(d *cluster.DockerVolume) { d.State, d.Name = cluster.DockerMaking, "a/b" }, CodeBadName)
	put(func(d *cluster.DockerVolume) { d.State, d.Volume = cluster.DockerMaking, cluster.ID{9} }, CodeNoVolume)
	put(to(cluster.DockerMaking), "")
	put(to(cluster.DockerMaking), "")
	put(func(d *cluster.DockerVolume) { d.State, d.ID = cluster.DockerMaking, cluster.ID{2} }, CodeConflict)
	put(func(d *cluster.DockerVolume) { d.State, d.Mode = cluster.DockerReady, 0o700 }, CodeBadCommand)
	put(func(d *cluster.DockerVolume) {
		d.State, d.ID, d.Name, d.Dir = cluster.DockerMaking, cluster.ID{3}, "other", "demo/sub"
	}, CodeInUse)
	put(to(cluster.DockerReady), "")
	put(to(cluster.DockerMaking), CodeConflict)
	if err := drop(d.ID); err == nil {
		t.Fatal("forgotten while it is ready")
	}
	if err := s.Apply(Command{DeleteVolume: &DeleteVolume{Volume: volumeID("v")}}); !errors.Is(err, &Error{Code: CodeInUse}) {
		t.Fatalf("its volume may be deleted: %v", err)
	}
	put(to(cluster.DockerRemoving), "")
	if err := drop(cluster.ID{2}); err == nil {
		t.Fatal("another one was forgotten")
	}
	if err := drop(d.ID); err != nil {
		t.Fatal(err)
	}
	if s.Map.DockerVolume("demo") != nil {
		t.Fatal("it is still there")
	}
	if err := s.Apply(Command{DeleteVolume: &DeleteVolume{Volume: volumeID("v")}}); err != nil {
		t.Fatal(err)
	}
}
