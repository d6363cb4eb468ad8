package cli

import (
	"fmt"
	"slices"
	"strings"

	"github.com/spf13/cobra"
)

// resolve writes out the words of a command line that are unambiguous
// beginnings: "v inf" becomes "volume info". Words after the last verb are the
// verb's own business.
func resolve(root *cobra.Command, args []string) ([]string, error) {
	if len(args) > 0 && strings.HasPrefix(args[0], cobra.ShellCompRequestCmd) {
		return args, nil // a shell asks for completions
	}
	out := slices.Clone(args)
	at, position := root, 0
	for i := 0; i < len(out) && at.HasAvailableSubCommands(); i++ {
		arg := out[i]
		if arg == "--" {
			break
		}
		if strings.HasPrefix(arg, "-") {
			if takesValue(at, arg) {
				i++
			}
			continue
		}
		next, err := find(at, arg, position)
		if err != nil {
			return nil, err
		}
		out[i] = next.Name()
		at = next
		position++
	}
	return out, nil
}

// takesValue reports whether the next word is the value of the flag.
func takesValue(cmd *cobra.Command, arg string) bool {
	if strings.Contains(arg, "=") {
		return false
	}
	if name, ok := strings.CutPrefix(arg, "--"); ok {
		f := cmd.Flag(name)
		return f != nil && f.NoOptDefVal == ""
	}
	f := cmd.Flags().ShorthandLookup(arg[len(arg)-1:])
	return f != nil && f.NoOptDefVal == ""
}

// find returns the command below at that s names or begins.
func find(at *cobra.Command, s string, position int) (*cobra.Command, error) {
	var begun []*cobra.Command
	var names []string
	for _, c := range at.Commands() {
		if c.Name() == s || c.HasAlias(s) {
			return c, nil
		}
		if c.Hidden {
			continue
		}
		names = append(names, c.Name())
		if strings.HasPrefix(c.Name(), s) {
			begun = append(begun, c)
		}
	}
	switch {
	case len(begun) == 1:
		return begun[0], nil
	case len(begun) > 1:
		var may []string
		for _, c := range begun {
			may = append(may, c.Name())
		}
		slices.Sort(may)
		return nil, &usageError{text: fmt.Sprintf("ambiguous word: %s (position %d): %s", s, position, strings.Join(may, ", "))}
	}
	text := fmt.Sprintf("unrecognized word: %s (position %d)", s, position)
	if why := elsewhere[at.Name()+" "+s]; why != "" {
		text += "\n" + why
	} else if near := nearest(s, names); near != "" {
		text += fmt.Sprintf("\nDid you mean %s?", near)
	}
	return nil, &usageError{text: text}
}

// elsewhere says what to do in place of words of the gluster command that
// mortar does not need.
var elsewhere = map[string]string{
	"volume sync":            "Every peer has the whole configuration; there is nothing to synchronize.",
	"volume barrier":         "mortar has no write barriers; an fsync is one flush of the log.",
	"volume clear-locks":     "Locks of a dead client go by themselves, after its lease.",
	"volume geo-replication": "mortar replicates within one pool only.",
	"system:: uuid":          "A cloned machine gets a new identity with \"mortar server --new-identity\".",
	"gluster nfs-ganesha":    "mortar does not manage NFS-Ganesha.",
	"mortar nfs-ganesha":     "mortar does not manage NFS-Ganesha.",
}

// nearest returns the candidate that s is most likely a misspelling of, or "".
func nearest(s string, candidates []string) string {
	best, bestDistance := "", len(s)/3+1
	for _, c := range candidates {
		if d := distance(s, c); d <= bestDistance && (best == "" || d < bestDistance) {
			best, bestDistance = c, d
		}
	}
	return best
}

// distance counts the edits (insertion, deletion, substitution, exchange of
// neighbours) between two words.
func distance(a, b string) int {
	rows := make([][]int, len(a)+1)
	for i := range rows {
		rows[i] = make([]int, len(b)+1)
		rows[i][0] = i
	}
	for j := range rows[0] {
		rows[0][j] = j
	}
	for i := 1; i <= len(a); i++ {
		for j := 1; j <= len(b); j++ {
			cost := 1
			if a[i-1] == b[j-1] {
				cost = 0
			}
			rows[i][j] = min(rows[i-1][j]+1, rows[i][j-1]+1, rows[i-1][j-1]+cost)
			if i > 1 && j > 1 && a[i-1] == b[j-2] && a[i-2] == b[j-1] {
				rows[i][j] = min(rows[i][j], rows[i-2][j-2]+1)
			}
		}
	}
	return rows[len(a)][len(b)]
}
