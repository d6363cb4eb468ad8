package main

import (
	"bytes"
	"path"
	"strings"

	"github.com/google/rpmpack"
)

// rpm is the package for rpm. Its scripts are told how many of the package there
// will be when they are done.
func (p *pkg) rpm(arch string) ([]byte, error) {
	r, err := rpmpack.NewRPM(rpmpack.RPMMetaData{
		Name: "mortar", Version: p.version, Release: p.revision, Arch: arch,
		Summary: summary, Description: strings.ReplaceAll(description, "\n", " "), Licence: "Apache-2.0",
		BuildHost: "localhost", BuildTime: p.when, Epoch: rpmpack.NoEpoch, Compressor: "gzip:6",
	})
	if err != nil {
		return nil, err
	}
	const (
		link = 0o120000
		dir  = 0o040000
	)
	// A directory that is the package's alone is removed with it if the package says so; all
	// others are the distribution's.
	dirs := map[string]bool{}
	for _, f := range p.files {
		if !f.in("rpm") {
			continue
		}
		if at := path.Dir(f.name); !dirs[at] && (path.Base(at) == "mortar" || path.Base(at) == "docker.service.d") {
			dirs[at] = true
			r.AddFile(rpmpack.RPMFile{Name: at, Mode: dir | 0o755, Owner: "root", Group: "root", MTime: uint32(p.when.Unix())})
		}
		rf := rpmpack.RPMFile{Name: f.name, Body: f.body, Mode: uint(f.mode), Owner: "root", Group: "root", MTime: uint32(p.when.Unix())}
		if f.link != "" {
			rf.Body, rf.Mode = []byte(f.link), link|uint(f.mode)
		}
		if f.config {
			rf.Type = rpmpack.ConfigFile | rpmpack.NoReplaceFile
		}
		r.AddFile(rf)
	}
	r.AddPrein(string(p.script(`before_unpacking`)))
	r.AddPostin(string(p.script(`if [ "$1" -gt 1 ]; then after_unpacking upgrade; else after_unpacking ""; fi`)))
	r.AddPreun(string(p.script(`if [ "$1" -eq 0 ]; then before_removal; fi`)))
	r.AddPostun(string(p.script(`if [ "$1" -eq 0 ]; then after_removal; fi`)))
	var out bytes.Buffer
	err = r.Write(&out)
	return out.Bytes(), err
}
