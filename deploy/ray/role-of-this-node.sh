#!/bin/sh
# Print the role of this machine from roles.txt beside this file; fail loudly if it has none.
folder=$(dirname "$0")
for address in $(hostname -I); do
    role=$(awk -v a="$address" '$1 == a {print $2}' "$folder/roles.txt")
    if [ -n "$role" ]; then
        echo "$role"
        exit 0
    fi
done
echo "no address of this machine ($(hostname -I)) is in $folder/roles.txt" >&2
exit 1
