// Mortar is a replicated file system for small clusters: daemon, command line
// and mount in one program. See package cli.
package main

import (
	"os"

	"mortar/internal/cli"
)

func main() { os.Exit(cli.Main(os.Args, os.Stdin, os.Stdout, os.Stderr)) }
