#!/bin/sh
# What a package does besides its files; each of its scripts begins with this.
set -e

systemd() { [ -d /run/systemd/system ]; }
protocol() { sed -n 's/.*protocol \([0-9]*\).*/\1/p'; }
before=/run/mortar.before-upgrade

# before_unpacking writes down which program is about to be replaced.
before_unpacking() {
	if [ -x /usr/bin/mortar ]; then
		/usr/bin/mortar version >"$before" 2>/dev/null || rm -f "$before"
	fi
}

# after_unpacking "" is the first installation, anything else an upgrade.
after_unpacking() {
	if ! grep -q '^mortar:' /etc/group 2>/dev/null; then
		groupadd --system mortar 2>/dev/null || addgroup --system mortar 2>/dev/null || addgroup -S mortar ||
			echo "mortar: there is no group mortar: only root may ask the daemon" >&2
	fi
	# Lines with "glusterfs" in fstab go on working on a machine without GlusterFS.
	# Its own helper is not replaced, and takes the place of this link if it comes.
	if [ ! -e /usr/sbin/mount.glusterfs ] && [ ! -L /usr/sbin/mount.glusterfs ] && [ ! -e /sbin/mount.glusterfs ]; then
		ln -s ../bin/mortar /usr/sbin/mount.glusterfs
	fi
	if systemd; then
		systemctl daemon-reload
	fi
	if [ -z "$1" ]; then
		echo "mortar: \"systemctl enable --now mortar\" starts the daemon of this machine, \"mortar server\" does without systemd"
	elif [ -e "$before" ] && [ "$(protocol <"$before")" != "$(/usr/bin/mortar version | protocol)" ]; then
		echo "mortar: this version speaks another protocol than the one before, so nothing was restarted: upgrade all machines, then restart the daemons and mount anew"
	elif systemd; then
		systemctl try-restart mortar.service
	else
		echo "mortar: the daemon is the old version until it is restarted"
	fi
	rm -f "$before"
}

before_removal() {
	if systemd; then
		systemctl disable --now mortar.service || true
	fi
	if [ "$(readlink /usr/sbin/mount.glusterfs 2>/dev/null)" = ../bin/mortar ]; then
		rm -f /usr/sbin/mount.glusterfs
	fi
	if grep -q ' fuse.mortar ' /proc/mounts 2>/dev/null; then
		echo "mortar: volumes are mounted, and stay so until they are unmounted: grep fuse.mortar /proc/mounts" >&2
	fi
}

after_removal() {
	if systemd; then
		systemctl daemon-reload
	fi
}

# purge forgets that this machine was in a pool. Bricks are never touched, wherever they are.
purge() {
	rm -rf /var/log/mortar
	if [ -d /var/lib/mortar ]; then
		if grep -q ' /var/lib/mortar' /proc/mounts 2>/dev/null || find /var/lib/mortar -name .mortar | grep -q .; then
			echo "mortar: /var/lib/mortar has bricks or mounts in it and was left alone" >&2
		else
			rm -rf /var/lib/mortar
		fi
	fi
}

