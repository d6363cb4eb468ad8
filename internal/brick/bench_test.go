package brick

import (
	"context"
	"fmt"
	"math/rand/v2"
	"syscall"
	"testing"
	"time"

	"mortar/internal/cluster"
	"mortar/internal/fsop"
	"mortar/internal/proto"
)

// benchSession opens a session and returns a function that executes ops of it.
func benchSession(b *testing.B, o *opened) func(fsop.Op) *Result {
	const id = cluster.SessionID(99)
	e := o.entry(&fsop.OpenSession{Client: "bench"})
	e.Session = id
	if _, err := o.Execute(e, nil); err != nil {
		b.Fatal(err)
	}
	pos, now := e.Pos, e.Time
	number := uint64(0)
	return func(op fsop.Op) *Result {
		pos.Seq++
		now++
		number++
		r, err := o.Execute(&proto.Entry{Pos: pos, Time: now, Session: id, Number: number, Acked: number - min(number, 4), Op: op}, nil)
		if err != nil {
			b.Fatal(err)
		}
		o.Commit(pos.Seq)
		return r
	}
}

func BenchmarkExecuteCreate(b *testing.B) {
	o := benchBrick(b)
	do := benchSession(b, o)
	var dir fsop.Ino
	defer cpu(b)()
	for i := range b.N {
		if i%1000 == 0 {
			dir = do(&fsop.Mkdir{Node: fsop.Node{Parent: fsop.RootIno, Name: fmt.Sprintf("d%d", i), Mode: 0o755}}).Reply.Attr.Ino
		}
		do(&fsop.Create{Node: fsop.Node{Parent: dir, Name: fmt.Sprintf("file-%d", i), Mode: 0o644}, Excl: true})
	}
}

func BenchmarkExecuteWrite4K(b *testing.B) {
	o := benchBrick(b)
	do := benchSession(b, o)
	f := do(&fsop.Create{Node: fsop.Node{Parent: fsop.RootIno, Name: "f", Mode: 0o644}}).Reply.Attr.Ino
	data := make([]byte, 4096)
	rng := rand.New(rand.NewPCG(1, 1))
	const blocks = 1 << 16
	do(&fsop.Setattr{Ino: f, Valid: fsop.SetSize, Size: blocks * 4096})
	do(&fsop.Fallocate{Ino: f, Len: blocks * 4096})
	b.SetBytes(4096)
	defer cpu(b)()
	for range b.N {
		do(&fsop.Write{Ino: f, Off: 4096 * rng.Uint64N(blocks), Data: data})
	}
}

func BenchmarkExecuteWrite128K(b *testing.B) {
	o := benchBrick(b)
	do := benchSession(b, o)
	f := do(&fsop.Create{Node: fsop.Node{Parent: fsop.RootIno, Name: "f", Mode: 0o644}}).Reply.Attr.Ino
	data := make([]byte, 128<<10)
	b.SetBytes(int64(len(data)))
	defer cpu(b)()
	for i := range b.N {
		do(&fsop.Write{Ino: f, Off: uint64(i%8192) * uint64(len(data)), Data: data})
	}
}

// benchTree makes files in directories of 1000.
func benchTree(b *testing.B, o *opened, files, size int) (dirs []fsop.Ino, inos []fsop.Ino) {
	do := benchSession(b, o)
	data := make([]byte, size)
	for i := range files {
		if i%1000 == 0 {
			dirs = append(dirs, do(&fsop.Mkdir{Node: fsop.Node{Parent: fsop.RootIno, Name: fmt.Sprintf("d%d", i/1000), Mode: 0o755}}).Reply.Attr.Ino)
		}
		f := do(&fsop.Create{Node: fsop.Node{Parent: dirs[i/1000], Name: fmt.Sprintf("file-%d", i), Mode: 0o644}, Excl: true}).Reply.Attr.Ino
		if size > 0 {
			do(&fsop.Write{Ino: f, Data: data})
		}
		inos = append(inos, f)
	}
	return dirs, inos
}

// cpu reports the processor time of the whole process per operation, background
// work included: other processes do not disturb it as much as the clock.
func cpu(b *testing.B) func() {
	var from syscall.Rusage
	syscall.Getrusage(syscall.RUSAGE_SELF, &from)
	b.ReportAllocs()
	b.ResetTimer()
	return func() {
		var to syscall.Rusage
		syscall.Getrusage(syscall.RUSAGE_SELF, &to)
		used := to.Utime.Nano() - from.Utime.Nano() + to.Stime.Nano() - from.Stime.Nano()
		b.ReportMetric(float64(used)/1e3/float64(b.N), "cpu-µs/op")
	}
}

func benchRead(b *testing.B, o *opened, op func(i int) fsop.Op) {
	ctx := context.Background()
	defer cpu(b)()
	for i := range b.N {
		if _, _, err := o.Read(ctx, op(i)); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkRead(b *testing.B) {
	const files = 50000
	o := benchBrick(b)
	dirs, inos := benchTree(b, o, files, 4000)
	rng := rand.New(rand.NewPCG(1, 1))
	names := make([]string, files)
	for i := range names {
		names[i] = fmt.Sprintf("file-%d", i)
	}
	run := func(name string) {
		b.Run(name+"/lookup-cold", func(b *testing.B) {
			benchRead(b, o, func(int) fsop.Op {
				i := rng.IntN(files)
				return &fsop.Lookup{Parent: dirs[i/1000], Name: names[i]}
			})
		})
		b.Run(name+"/lookup-hot", func(b *testing.B) {
			benchRead(b, o, func(i int) fsop.Op {
				i = i % 1000
				return &fsop.Lookup{Parent: dirs[i/1000], Name: names[i]}
			})
		})
		b.Run(name+"/getattr-cold", func(b *testing.B) {
			benchRead(b, o, func(int) fsop.Op { return &fsop.Getattr{Ino: inos[rng.IntN(files)]} })
		})
		b.Run(name+"/getattr-hot", func(b *testing.B) {
			benchRead(b, o, func(i int) fsop.Op { return &fsop.Getattr{Ino: inos[i%1000]} })
		})
		b.Run(name+"/read-cold", func(b *testing.B) {
			benchRead(b, o, func(int) fsop.Op { return &fsop.Read{Ino: inos[rng.IntN(files)], Len: 128 << 10} })
		})
		b.Run(name+"/read-hot", func(b *testing.B) {
			benchRead(b, o, func(i int) fsop.Op { return &fsop.Read{Ino: inos[i%1000], Len: 128 << 10} })
		})
		b.Run(name+"/readdirplus-1000", func(b *testing.B) {
			benchRead(b, o, func(i int) fsop.Op {
				return &fsop.Readdir{Ino: dirs[i%len(dirs)], Max: 1 << 20, Plus: true}
			})
		})
	}
	run("log")
	o.settleAll()
	o.settleAll()
	run("settled")
}

// BenchmarkHeal compares a brick of 100,000 files with one that has nothing,
// then with one that has three differences.
func BenchmarkHeal(b *testing.B) {
	const files = 100000
	from := benchBrick(b)
	_, inos := benchTree(b, from, files, 4000)
	from.settleAll()
	from.settleAll()
	run := func(b *testing.B, to *opened) {
		src, err := from.Source()
		if err != nil {
			b.Fatal(err)
		}
		defer src.Close()
		if err := to.Heal(context.Background(), src.Pos(), src.Serve, nil); err != nil {
			b.Fatal(err)
		}
	}

	b.Run("everything", func(b *testing.B) {
		for range b.N {
			b.StopTimer()
			to := benchBrick(b)
			b.StartTimer()
			done := cpu(b)
			run(b, to)
			done()
		}
		b.ReportMetric(float64(files)*float64(b.N)/b.Elapsed().Seconds(), "files/s")
	})
	b.Run("three-files", func(b *testing.B) {
		to := benchBrick(b)
		run(b, to)
		data := make([]byte, 4000)
		b.ResetTimer()
		for i := range b.N {
			b.StopTimer()
			for k := range 3 {
				data[0]++
				from.write(inos[(i*3+k)*7919%files], 0, data)
			}
			from.Commit(from.Tail().Seq)
			b.StartTimer()
			run(b, to)
		}
	})
	b.Run("digest", func(b *testing.B) {
		for range b.N {
			if _, err := from.Digest(context.Background()); err != nil {
				b.Fatal(err)
			}
		}
	})
}

// BenchmarkInline settles small files into the KV or into data files, and reads
// them: what Options.Inline was chosen by.
func BenchmarkInline(b *testing.B) {
	const files = 2000
	for _, size := range []int{4 << 10, 16 << 10, 32 << 10, 64 << 10} {
		for _, inline := range []bool{true, false} {
			b.Run(fmt.Sprintf("%dK/inline=%v", size>>10, inline), func(b *testing.B) {
				o := benchBrick(b, func(o *Options) {
					o.Inline = -1
					if inline {
						o.Inline = size
					}
				})
				do := benchSession(b, o)
				data := make([]byte, size)
				rng := rand.NewChaCha8([32]byte{})
				n := 0
				done := cpu(b)
				for range b.N {
					b.StopTimer()
					for range files {
						n++
						rng.Read(data)
						f := do(&fsop.Create{Node: fsop.Node{Parent: fsop.RootIno, Name: fmt.Sprint(n)}}).Reply.Attr.Ino
						do(&fsop.Write{Ino: f, Data: data})
					}
					b.StartTimer()
					o.settleAll()
				}
				done()
				b.ReportMetric(float64(b.Elapsed().Microseconds())/float64(n), "µs/file")
				from := time.Now()
				for range 5000 {
					o.get(&fsop.Read{Ino: 2 + fsop.Ino(rng.Uint64()%uint64(n)), Len: uint32(size)})
				}
				b.ReportMetric(float64(time.Since(from).Microseconds())/5000, "µs/read")
			})
		}
	}
}

// BenchmarkUnlink removes files of 4 KiB and forgets them, a thousand at a time,
// as a primary does that deletes at full speed.
func BenchmarkUnlink(b *testing.B) {
	o := benchBrick(b)
	do := benchSession(b, o)
	dir := do(&fsop.Mkdir{Node: fsop.Node{Parent: fsop.RootIno, Name: "d", Mode: 0o755}}).Reply.Attr.Ino
	data := make([]byte, 4096)
	for i := range b.N {
		f := do(&fsop.Create{Node: fsop.Node{Parent: dir, Name: fmt.Sprintf("file-%d", i), Mode: 0o644}, Excl: true}).Reply.Attr.Ino
		do(&fsop.Write{Ino: f, Data: data})
	}
	var reap time.Duration
	stop := cpu(b)
	b.ResetTimer()
	for i := range b.N {
		do(&fsop.Unlink{Parent: dir, Name: fmt.Sprintf("file-%d", i)})
		if i%1000 == 999 || i == b.N-1 {
			began := time.Now()
			do(&fsop.Reap{Inos: o.Orphans(0, 8192)})
			reap += time.Since(began)
		}
	}
	stop()
	b.ReportMetric(float64(reap.Microseconds())/float64(b.N), "reap-µs/op")
}
