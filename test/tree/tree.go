// Package tree has the directory trees that tests and benchmarks copy about,
// and tells whether two trees are the same to the last bit that a program
// could see.
package tree

import (
	"archive/tar"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"sort"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// Places of an unpacked WordPress, best first: given by hand, installed, and
// where test/install-packages puts it.
func places() []string {
	return []string{os.Getenv("MORTAR_TEST_WORDPRESS"), "/usr/share/wordpress", "/var/cache/mortar-test/wordpress"}
}

// WordPress returns the directory of a real WordPress, or "" where there is none.
func WordPress() string {
	for _, dir := range places() {
		if _, err := os.Stat(filepath.Join(dir, "wp-includes")); dir != "" && err == nil {
			return dir
		}
	}
	return ""
}

// Make fills dir with a tree of WordPress's shape: about as many files in
// the same kind of directories, of such sizes, made of words that compress
// like PHP. Equal seeds make equal trees.
func Make(dir string, seed uint64) error {
	rng := rand.New(rand.NewPCG(seed, 1))
	// Directory, files in it, median size; the sums are those of WordPress 6.1.
	parts := []struct {
		dir    string
		files  int
		median int
		ext    string
	}{
		{"", 18, 3000, "php"},
		{"wp-admin", 95, 8000, "php"},
		{"wp-admin/css", 90, 9000, "css"},
		{"wp-admin/css/colors/blue", 8, 6000, "css"},
		{"wp-admin/images", 80, 1500, "png"},
		{"wp-admin/includes", 108, 14000, "php"},
		{"wp-admin/js", 85, 9000, "js"},
		{"wp-admin/js/widgets", 14, 7000, "js"},
		{"wp-admin/network", 28, 3000, "php"},
		{"wp-content/languages", 30, 60000, "mo"},
		{"wp-content/plugins/akismet", 40, 8000, "php"},
		{"wp-content/plugins/akismet/views", 20, 3000, "php"},
		{"wp-content/themes/twentytwentythree", 12, 4000, "html"},
		{"wp-content/themes/twentytwentythree/parts", 10, 900, "html"},
		{"wp-content/themes/twentytwentythree/patterns", 20, 2000, "php"},
		{"wp-content/themes/twentytwentythree/assets/fonts", 18, 70000, "woff2"},
		{"wp-content/themes/twentytwentytwo/inc/patterns", 60, 3000, "php"},
		{"wp-content/themes/twentytwentyone/template-parts", 40, 1500, "php"},
		{"wp-content/themes/twentytwentyone/assets/sass", 90, 2000, "scss"},
		{"wp-includes", 230, 12000, "php"},
		{"wp-includes/ID3", 16, 60000, "php"},
		{"wp-includes/IXR", 12, 3000, "php"},
		{"wp-includes/PHPMailer", 7, 30000, "php"},
		{"wp-includes/Requests/Exception/HTTP", 40, 700, "php"},
		{"wp-includes/SimplePie/XML", 50, 5000, "php"},
		{"wp-includes/Text/Diff", 12, 6000, "php"},
		{"wp-includes/block-patterns", 16, 2500, "php"},
		{"wp-includes/blocks", 110, 4000, "php"},
		{"wp-includes/certificates", 1, 220000, "crt"},
		{"wp-includes/css", 60, 6000, "css"},
		{"wp-includes/css/dist", 150, 12000, "css"},
		{"wp-includes/customize", 27, 7000, "php"},
		{"wp-includes/fonts", 6, 30000, "woff"},
		{"wp-includes/images/media", 60, 900, "png"},
		{"wp-includes/js", 120, 14000, "js"},
		{"wp-includes/js/dist", 110, 45000, "js"},
		{"wp-includes/js/tinymce/plugins", 100, 7000, "js"},
		{"wp-includes/js/jquery/ui", 70, 9000, "js"},
		{"wp-includes/rest-api/endpoints", 60, 12000, "php"},
		{"wp-includes/sitemaps/providers", 12, 4000, "php"},
		{"wp-includes/widgets", 24, 6000, "php"},
	}
	words := strings.Fields("function return array string $this-> if else foreach echo null true false " +
		"public static isset( ) { } ; => 'post' 'user' 'option' get_option( add_filter( apply_filters( " +
		"__( esc_html( $args $value $key /** * @since 6.1.0 @param @return */ // && || === !== . , ( )")
	for _, p := range parts {
		d := filepath.Join(dir, p.dir)
		if err := os.MkdirAll(d, 0o755); err != nil {
			return err
		}
		for i := range p.files {
			// Long lists are spread over directories, as blocks and languages are.
			at := d
			if p.files >= 60 && p.dir != "wp-includes" {
				at = filepath.Join(d, fmt.Sprintf("part-%d", i/12))
				if err := os.MkdirAll(at, 0o755); err != nil {
					return err
				}
			}
			size := int(float64(p.median) * (0.1 + rng.ExpFloat64()*1.3))
			var b strings.Builder
			for b.Len() < size {
				b.WriteString(words[rng.IntN(len(words))])
				b.WriteByte(" \n"[rng.IntN(8)/7])
			}
			name := filepath.Join(at, fmt.Sprintf("class-wp-%03d.%s", i, p.ext))
			if err := os.WriteFile(name, []byte(b.String()[:size]), 0o644); err != nil {
				return err
			}
		}
	}
	return os.Symlink("wp-admin/class-wp-000.php", filepath.Join(dir, "start.php"))
}

// Tar writes dir as a tar archive to w: numeric owners, times, extended
// attributes, hard links once.
func Tar(w io.Writer, dir string) error {
	out := tar.NewWriter(w)
	links := map[[2]uint64]string{}
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, _ := filepath.Rel(dir, path)
		if rel == "." {
			return nil
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		target := ""
		if info.Mode()&fs.ModeSymlink != 0 {
			if target, err = os.Readlink(path); err != nil {
				return err
			}
		}
		head, err := tar.FileInfoHeader(info, target)
		if err != nil {
			return err
		}
		head.Name, head.Uname, head.Gname, head.Format = rel, "", "", tar.FormatPAX
		xattrs, err := xattrsOf(path)
		if err != nil {
			return err
		}
		for k, v := range xattrs {
			if head.PAXRecords == nil {
				head.PAXRecords = map[string]string{}
			}
			head.PAXRecords["SCHILY.xattr."+k] = v
		}
		st := info.Sys().(*syscall.Stat_t)
		if info.Mode().IsRegular() && st.Nlink > 1 {
			key := [2]uint64{st.Dev, st.Ino}
			if first, ok := links[key]; ok {
				head.Typeflag, head.Linkname, head.Size = tar.TypeLink, first, 0
				return out.WriteHeader(head)
			}
			links[key] = rel
		}
		if err := out.WriteHeader(head); err != nil || !info.Mode().IsRegular() {
			return err
		}
		f, err := os.Open(path)
		if err != nil {
			return err
		}
		defer f.Close()
		_, err = io.Copy(out, f)
		return err
	})
	if err != nil {
		return err
	}
	return out.Close()
}

// Manifest describes everything below dir, one line for each object, sorted by
// path: type and mode, owner, links, size, modification time in nanoseconds,
// device, target, extended attributes, and the SHA-256 of the contents. Equal
// manifests are equal trees.
func Manifest(dir string) ([]string, error) {
	var out []string
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		var st unix.Stat_t
		if err := unix.Lstat(path, &st); err != nil {
			return &fs.PathError{Op: "lstat", Path: path, Err: err}
		}
		rel, _ := filepath.Rel(dir, path)
		line := fmt.Sprintf("%q mode=%o owner=%d:%d", rel, st.Mode, st.Uid, st.Gid)
		if rel != "." { // the root's own time and links are its parent's business
			line += fmt.Sprintf(" links=%d mtime=%d.%09d", st.Nlink, st.Mtim.Sec, st.Mtim.Nsec)
		}
		if want := entryType(st.Mode); d.Type() != want && rel != "." {
			line += fmt.Sprintf(" readdir-says=%v", d.Type())
		}
		switch st.Mode & unix.S_IFMT {
		case unix.S_IFREG:
			sum, n, err := sumOf(path)
			if err != nil {
				return err
			}
			line += fmt.Sprintf(" size=%d sha256=%s", st.Size, sum)
			if n != st.Size {
				line += fmt.Sprintf(" read=%d", n)
			}
		case unix.S_IFLNK:
			target, err := os.Readlink(path)
			if err != nil {
				return err
			}
			line += fmt.Sprintf(" size=%d target=%q", st.Size, target)
		case unix.S_IFCHR, unix.S_IFBLK:
			line += fmt.Sprintf(" device=%x", st.Rdev)
		}
		xattrs, err := xattrsOf(path)
		if err != nil {
			return err
		}
		for _, k := range slices.Sorted(func(yield func(string) bool) {
			for k := range xattrs {
				if !yield(k) {
					return
				}
			}
		}) {
			line += fmt.Sprintf(" %s=%q", k, xattrs[k])
		}
		out = append(out, line)
		return nil
	})
	sort.Strings(out)
	return out, err
}

func entryType(mode uint32) fs.FileMode {
	switch mode & unix.S_IFMT {
	case unix.S_IFDIR:
		return fs.ModeDir
	case unix.S_IFLNK:
		return fs.ModeSymlink
	case unix.S_IFIFO:
		return fs.ModeNamedPipe
	case unix.S_IFSOCK:
		return fs.ModeSocket
	case unix.S_IFCHR:
		return fs.ModeDevice | fs.ModeCharDevice
	case unix.S_IFBLK:
		return fs.ModeDevice
	}
	return 0
}

func sumOf(path string) (string, int64, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", 0, err
	}
	defer f.Close()
	h := sha256.New()
	n, err := io.Copy(h, f)
	if err != nil {
		return "", 0, err
	}
	return hex.EncodeToString(h.Sum(nil)), n, nil
}

// xattrsOf returns the extended attributes of a file itself, never of a link's
// target. A file system without any has none.
func xattrsOf(path string) (map[string]string, error) {
	buf := make([]byte, 64<<10)
	n, err := unix.Llistxattr(path, buf)
	if errors.Is(err, unix.ENOTSUP) || n == 0 && err == nil {
		return nil, nil
	}
	if err != nil {
		return nil, &fs.PathError{Op: "llistxattr", Path: path, Err: err}
	}
	out := map[string]string{}
	value := make([]byte, 64<<10)
	for _, name := range strings.Split(strings.TrimSuffix(string(buf[:n]), "\x00"), "\x00") {
		n, err := unix.Lgetxattr(path, name, value)
		if err != nil {
			return nil, &fs.PathError{Op: "lgetxattr " + name, Path: path, Err: err}
		}
		out[name] = string(value[:n])
	}
	return out, nil
}

// Diff tells what two manifests differ in, at most max lines of it; nil if they are equal.
func Diff(want, got []string, max int) []string {
	var out []string
	in := func(lines []string) map[string]bool {
		m := make(map[string]bool, len(lines))
		for _, l := range lines {
			m[l] = true
		}
		return m
	}
	inWant, inGot := in(want), in(got)
	for _, l := range want {
		if !inGot[l] {
			out = append(out, "- "+l)
		}
	}
	for _, l := range got {
		if !inWant[l] {
			out = append(out, "+ "+l)
		}
	}
	sort.Slice(out, func(i, j int) bool { return out[i][2:] < out[j][2:] })
	if len(out) > max {
		out = append(out[:max], fmt.Sprintf("... and %d more", len(out)-max))
	}
	return out
}
