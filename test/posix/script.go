package posix

import (
	"fmt"
	"regexp"
	"strconv"
	"strings"
)

// A testCase is a title and the statements under it.
type testCase struct {
	title      string
	where      string // file:line
	only       []string
	statements []statement
}

// A statement is one line of a script: a call, who makes it, and what is expected of it.
type statement struct {
	where string
	text  string   // as written, with variables put in
	only  []string // file systems it is for; with '!' in front, that it is not for
	user  string
	call  string
	args  []string
	as    string // the name for a descriptor that the call returns
	soon  bool   // the outcome may take a moment
	want  string
	value bool // want is compared with a value, and is not an error
}

// line is a line of a script, its loops unrolled.
type line struct {
	where, text string
}

// parse reads a script. The language is described in the package's documentation.
func parse(name, text string) ([]testCase, error) {
	var lines []line
	joined, first := "", 0
	for i, s := range strings.Split(text, "\n") {
		if joined == "" {
			first = i + 1
		}
		s = strings.TrimSpace(withoutComment(s))
		if rest, more := strings.CutSuffix(s, `\`); more {
			joined += rest + " "
			continue
		}
		lines = append(lines, line{fmt.Sprintf("%s:%d", name, first), strings.TrimSpace(joined + s)})
		joined = ""
	}
	unrolled, rest, err := unroll(lines, false)
	if err != nil {
		return nil, err
	}
	if len(rest) > 0 {
		return nil, fmt.Errorf("%s: end without for", rest[0].where)
	}
	var cases []testCase
	for _, l := range unrolled {
		words, err := split(l.text)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", l.where, err)
		}
		if len(words) == 0 {
			continue
		}
		if words[0].text == "case" {
			c := testCase{where: l.where}
			rest := words[1:]
			for len(rest) > 0 && strings.HasPrefix(rest[0].text, "@") {
				c.only = append(c.only, rest[0].text[1:])
				rest = rest[1:]
			}
			title := strings.TrimSpace(strings.TrimPrefix(l.text, "case"))
			for range c.only {
				_, title, _ = strings.Cut(title, " ")
			}
			c.title = strings.TrimSpace(title)
			cases = append(cases, c)
			continue
		}
		if len(cases) == 0 {
			return nil, fmt.Errorf("%s: a statement before the first case", l.where)
		}
		st, err := parseStatement(l, words)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", l.where, err)
		}
		c := &cases[len(cases)-1]
		c.statements = append(c.statements, st)
	}
	return cases, nil
}

func withoutComment(s string) string {
	quoted := false
	for i := 0; i < len(s); i++ {
		switch {
		case quoted && s[i] == '\\':
			i++
		case s[i] == '"':
			quoted = !quoted
		case s[i] == '#' && !quoted && (i == 0 || s[i-1] == ' ' || s[i-1] == '\t'):
			return s[:i]
		}
	}
	return s
}

// unroll repeats what is between for and end. inside: an end is expected, and
// rest begins after it.
func unroll(lines []line, inside bool) (out, rest []line, err error) {
	for len(lines) > 0 {
		l := lines[0]
		words := strings.Fields(l.text)
		switch {
		case len(words) == 0:
			lines = lines[1:]
		case words[0] == "end":
			if !inside {
				return out, lines, nil
			}
			return out, lines[1:], nil
		case words[0] == "for":
			in := 1
			for in < len(words) && words[in] != "in" {
				in++
			}
			if in == 1 || in+1 >= len(words) {
				return nil, nil, fmt.Errorf("%s: for VARIABLE... in VALUE...", l.where)
			}
			// The body is unrolled for each value with the variables put in, so a
			// loop inside may run over a variable.
			vars := words[1:in]
			body, after, err := body(lines)
			if err != nil {
				return nil, nil, err
			}
			for _, v := range words[in+1:] {
				values := strings.Split(v, ":")
				if len(values) != len(vars) {
					return nil, nil, fmt.Errorf("%s: %d variables and %q", l.where, len(vars), v)
				}
				var once []line
				for _, b := range body {
					for i, name := range vars {
						b.text = strings.ReplaceAll(b.text, "$"+name, values[i])
					}
					once = append(once, b)
				}
				more, _, err := unroll(once, false)
				if err != nil {
					return nil, nil, err
				}
				out = append(out, more...)
			}
			lines = after
		default:
			out, lines = append(out, l), lines[1:]
		}
	}
	if inside {
		return nil, nil, fmt.Errorf("for without end")
	}
	return out, nil, nil
}

// body is what is between the for that lines begins with and its end.
func body(lines []line) (in, after []line, err error) {
	depth := 0
	for i, l := range lines {
		switch words := strings.Fields(l.text); {
		case len(words) == 0:
		case words[0] == "for":
			depth++
		case words[0] == "end":
			if depth--; depth == 0 {
				return lines[1:i], lines[i+1:], nil
			}
		}
	}
	return nil, nil, fmt.Errorf("%s: for without end", lines[0].where)
}

// word is an argument, and whether it was in quotes.
type word struct {
	text   string
	quoted bool
}

var repeated = regexp.MustCompile(`\{([^*{}]*)\*([0-9]+)\}`)

// split splits a line at blanks. A word in quotes is read as Go does; {ab*3} is ababab.
func split(s string) (words []word, err error) {
	for {
		s = strings.TrimLeft(s, " \t")
		if s == "" {
			return words, nil
		}
		var w word
		if s[0] == '"' {
			q, err := strconv.QuotedPrefix(s)
			if err != nil {
				return nil, fmt.Errorf("%s: %w", s, err)
			}
			s = s[len(q):]
			w.quoted = true
			if w.text, err = strconv.Unquote(q); err != nil {
				return nil, err
			}
		} else {
			end := strings.IndexAny(s, " \t")
			if end < 0 {
				end = len(s)
			}
			w.text, s = s[:end], s[end:]
		}
		w.text = repeated.ReplaceAllStringFunc(w.text, func(m string) string {
			part := repeated.FindStringSubmatch(m)
			n, _ := strconv.Atoi(part[2])
			return strings.Repeat(part[1], n)
		})
		words = append(words, w)
	}
}

func parseStatement(l line, words []word) (statement, error) {
	st := statement{where: l.where, text: l.text, user: "root"}
	for len(words) > 0 && strings.HasPrefix(words[0].text, "@") && !words[0].quoted {
		st.only = append(st.only, words[0].text[1:])
		words = words[1:]
	}
	if len(words) > 0 {
		if user, ok := strings.CutSuffix(words[0].text, ":"); ok {
			if _, known := users[user]; !known {
				return st, fmt.Errorf("no user %q", user)
			}
			st.user = user
			words = words[1:]
		}
	}
	if len(words) == 0 {
		return st, fmt.Errorf("no call")
	}
	if st.soon = words[0].text == "soon"; st.soon {
		words = words[1:]
	}
	st.call = words[0].text
	if _, ok := calls[st.call]; !ok {
		return st, fmt.Errorf("no call %q", st.call)
	}
	words = words[1:]
	for i := 0; i < len(words); i++ {
		w := words[i]
		switch {
		case w.quoted || w.text != "=" && w.text != "->":
			st.args = append(st.args, w.text)
		case i+1 >= len(words):
			return st, fmt.Errorf("nothing after %s", w.text)
		case w.text == "->":
			i++
			st.as = words[i].text
		default:
			rest := words[i+1:]
			var all []string
			for _, r := range rest {
				all = append(all, r.text)
			}
			st.want = strings.Join(all, " ")
			st.value = rest[0].quoted || !isErrors(st.want)
			return st, nil
		}
	}
	return st, nil
}

// isErrors says whether s is the name of an error, or several with | between. OK
// is the error of a call that succeeds.
func isErrors(s string) bool {
	for part := range strings.SplitSeq(s, "|") {
		if _, ok := errnos[part]; !ok && part != "OK" {
			return false
		}
	}
	return true
}
