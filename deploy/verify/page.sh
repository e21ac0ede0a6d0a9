#!/bin/sh
# Put a log between the marks `<!-- verify -->` and `<!-- /verify -->` of a page.
#   sh deploy/verify/page.sh LOG PAGE
set -eu
new=$(mktemp)
awk -v shown="$1" '
  /^<!-- verify -->$/ { print; print "```text"; while ((getline line < shown) > 0) print line; print "```"; skip = 1 }
  /^<!-- \/verify -->$/ { skip = 0 }
  !skip' "$2" > "$new"
cat "$new" > "$2"
rm "$new"
