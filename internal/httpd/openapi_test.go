package httpd

import (
	"bytes"
	"flag"
	"fmt"
	"os"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"mortar/internal/api"
)

var update = flag.Bool("update", false, "write the schemas of doc/openapi.yaml from the structs of package api")

const openapi = "../../doc/openapi.yaml"

// described are the structs that travel; those inside them are found by reflection.
var described = []any{
	api.Version{}, api.Pool{}, api.InviteRequest{}, api.Invitation{}, api.JoinRequest{}, api.JoinReply{},
	api.EnrollRequest{}, api.EnrollReply{}, api.ProbeRequest{}, api.ProbeReply{}, api.DrainReply{}, api.InvitedRequest{},
	api.VolumeCreate{}, api.Volume{}, api.OptionHelp{}, api.OptionsChange{}, api.OptionsReply{},
	api.VolumeStatus{}, api.HealInfo{}, api.HealRequest{}, api.HealReply{}, api.BrickPrepare{}, api.LocalBricks{},
	api.Subvolume{}, api.SubvolumeCreate{}, api.SubvolumeChange{}, api.SubvolumeRequest{},
	api.PoolRecovery{}, api.PoolRecover{}, api.VolumeRecovery{}, api.VolumeRecover{},
	api.ScrubReply{},
	api.Examination{}, api.LocalReach{}, api.LocalDocker{},
}

// TestOpenAPI keeps the document and the program together: the same paths, the
// same methods, the same fields.
func TestOpenAPI(t *testing.T) {
	doc, err := os.ReadFile(openapi)
	if err != nil {
		t.Fatal(err)
	}
	const mark = "\n  schemas:\n"
	head, _, ok := bytes.Cut(doc, []byte(mark))
	if !ok {
		t.Fatalf("%s has no schemas", openapi)
	}
	want := string(head) + mark + schemas()
	if *update {
		if err := os.WriteFile(openapi, []byte(want), 0o644); err != nil {
			t.Fatal(err)
		}
	} else if diff := cmp.Diff(want, string(doc)); diff != "" {
		t.Errorf("%s is not what go test ./internal/httpd -update writes:\n%s", openapi, diff)
	}

	documented := map[string]bool{}
	path := ""
	for line := range strings.Lines(string(head)) {
		line = strings.TrimRight(line, "\n")
		if p, ok := strings.CutPrefix(line, "  /"); ok {
			path = "/" + strings.TrimSuffix(p, ":")
		}
		if m := strings.TrimSpace(line); strings.HasPrefix(line, "    ") && !strings.HasPrefix(line, "     ") &&
			slices.Contains([]string{"get:", "put:", "post:", "delete:"}, m) {
			documented[strings.ToUpper(strings.TrimSuffix(m, ":"))+" "+path] = true
		}
	}
	served := map[string]bool{"GET /metrics": true}
	for path, methods := range New(Config{}).routes {
		for m := range methods {
			served[m+" "+path] = true
		}
	}
	if diff := cmp.Diff(served, documented); diff != "" {
		t.Errorf("paths served (-) and documented (+) differ:\n%s", diff)
	}
}

// schemas writes the schemas of everything that is described.
func schemas() string {
	var b strings.Builder
	var codes []string
	for _, c := range api.Codes() {
		codes = append(codes, string(c))
	}
	fmt.Fprintf(&b, "    Error:\n      type: object\n      properties:\n        code: {type: string, enum: [%s]}\n", strings.Join(codes, ", "))
	b.WriteString("        op_errno: {type: integer, description: the number that gluster's XML output has for it}\n")
	b.WriteString("        message: {type: string, description: \"what, where, and what to do next\"}\n")
	seen := map[string]bool{}
	var queue []reflect.Type
	for _, v := range described {
		queue = append(queue, reflect.TypeOf(v))
	}
	for len(queue) > 0 {
		t := queue[0]
		queue = queue[1:]
		if seen[t.Name()] {
			continue
		}
		seen[t.Name()] = true
		fmt.Fprintf(&b, "    %s:\n      type: object\n      properties:\n", t.Name())
		for _, f := range reflect.VisibleFields(t) {
			if f.Anonymous {
				continue
			}
			name, _, _ := strings.Cut(f.Tag.Get("json"), ",")
			text, more := schema(f.Type)
			queue = append(queue, more...)
			fmt.Fprintf(&b, "        %s: %s\n", name, text)
		}
	}
	return b.String()
}

func schema(t reflect.Type) (text string, more []reflect.Type) {
	switch {
	case t == reflect.TypeFor[time.Time]():
		return "{type: string, format: date-time}", nil
	case t == reflect.TypeFor[[]byte]():
		return "{type: string, format: byte}", nil
	}
	switch t.Kind() {
	case reflect.Pointer:
		return schema(t.Elem())
	case reflect.Slice:
		text, more = schema(t.Elem())
		return "{type: array, items: " + text + "}", more
	case reflect.Struct:
		return fmt.Sprintf("{$ref: \"#/components/schemas/%s\"}", t.Name()), []reflect.Type{t}
	case reflect.String:
		return "{type: string}", nil
	case reflect.Bool:
		return "{type: boolean}", nil
	case reflect.Float64:
		return "{type: number}", nil
	case reflect.Int, reflect.Int64, reflect.Uint64, reflect.Uint32, reflect.Uint16:
		return "{type: integer}", nil
	}
	panic("no schema for " + t.String())
}
