# Ringfort's two commands are `make run` and `make test`. Everything else is a part of them or a help beside them.
.POSIX:
.SILENT:
.PHONY: run build test lint unit deny bench bench-disk bench-start fuzz clean help

CARGO = cargo
# cargo-deny is installed below target/ when the machine has none.
DENY_VERSION = 0.20.2
TOOLS = $(CURDIR)/target/tools
# The software CPU needs an optimised build to be tested in sensible time; the `ci` profile keeps its assertions.
PROFILE = ci
# The fuzz targets are a workspace of their own; on random input they are part of the tests.
FUZZ = --manifest-path fuzz/Cargo.toml
# Seconds that each fuzz target runs for.
FUZZ_SECONDS = 60

# What the default guest is built with.
GUEST_PACKAGES = mmdebstrap e2fsprogs uidmap
TEST_PACKAGES = $(GUEST_PACKAGES) cpio qemu-system-x86 qemu-utils acpica-tools dmidecode curl openssh-client \
    iproute2 nftables dnsmasq-base iputils-ping procps passt gdb lz4 tcpdump
BENCH_PACKAGES = qemu-system-x86 qemu-utils iperf3

help: ## Say what there is
	echo 'make run     build Ringfort and boot the default guest (Debian, built on first use)'
	echo 'make test    everything that must hold: format, lints, tests, licences'
	echo 'make bench   the same guests under Ringfort, QEMU and the host, compared (QEMU=path for another QEMU, ARGS=--help)'
	echo 'make bench-disk  disks compared: the block layer with qemu-img, fio in a guest with QEMU (ARGS=--help)'
	echo 'make bench-start   CPU time to the guest'"'"'s first instruction under KVM, and memory beyond the guest'"'"'s'
	echo 'make lint    format and clippy only'
	echo 'make unit    the tests only'
	echo 'make deny    licences, duplicate and banned crates, sources'
	echo 'make fuzz    every fuzz target for FUZZ_SECONDS=$(FUZZ_SECONDS) (needs a nightly toolchain, a C++ compiler and cargo-fuzz)'

run: build
	scripts/need $(GUEST_PACKAGES)
	exec target/release/ringfort run $(ARGS)

build:
	$(CARGO) build --release -p ringfort

test:
	scripts/need $(TEST_PACKAGES)
	$(MAKE) lint
	$(MAKE) unit
	$(MAKE) deny

lint:
	$(CARGO) fmt --all -- --check
	$(CARGO) clippy --workspace --all-targets --profile $(PROFILE) -- -D warnings
	$(CARGO) fmt $(FUZZ) -- --check
	$(CARGO) clippy $(FUZZ) --target-dir target --all-targets --profile $(PROFILE) -- -D warnings

unit:
	$(CARGO) test --workspace --profile $(PROFILE)
	$(CARGO) test $(FUZZ) --target-dir target --profile $(PROFILE)

deny:
	if command -v cargo-deny >/dev/null; then cargo-deny --workspace check licenses bans sources; else \
	    test -x $(TOOLS)/bin/cargo-deny || \
	        $(CARGO) install cargo-deny --locked --version $(DENY_VERSION) --root $(TOOLS) --target-dir $(TOOLS)/build; \
	    $(TOOLS)/bin/cargo-deny --workspace check licenses bans sources; fi

bench: build
	scripts/need $(GUEST_PACKAGES) $(BENCH_PACKAGES)
	$(CARGO) run --release -q -p ringfort-bench --bin ringfort-bench -- --ringfort target/release/ringfort $(if $(QEMU),--qemu $(QEMU)) $(ARGS)
	$(CARGO) run --release -q -p ringfort-bench --bin ringfort-bench-net -- --ringfort target/release/ringfort $(if $(QEMU),--qemu $(QEMU)) $(NET_ARGS)
	if [ "$$(id -u)" = 0 ] && [ -c /dev/net/tun ]; then \
	    $(CARGO) run --release -q -p ringfort-bench --bin ringfort-bench-net -- --tap --ringfort target/release/ringfort $(if $(QEMU),--qemu $(QEMU)); \
	else echo 'skipped: networks over a tap: root and /dev/net/tun are needed'; fi
	$(CARGO) run --release -q -p ringfort-bench --bin ringfort-bench-disk -- --ringfort target/release/ringfort $(if $(QEMU),--qemu $(QEMU)) $(DISK_ARGS)

# The disks alone: block layer against qemu-img, fio in a guest against QEMU.
bench-disk: build
	scripts/need $(GUEST_PACKAGES) $(BENCH_PACKAGES) qemu-utils
	$(CARGO) run --release -q -p ringfort-bench --bin ringfort-bench-disk -- --ringfort target/release/ringfort $(if $(QEMU),--qemu $(QEMU)) $(ARGS)

bench-start: build
	$(CARGO) run --release -q -p ringfort-bench --bin ringfort-bench-start -- --ringfort target/release/ringfort $(ARGS)

fuzz:
	for target in $$($(CARGO) +nightly fuzz list); do \
	    $(CARGO) +nightly fuzz run "$$target" -- -max_total_time=$(FUZZ_SECONDS) || exit 1; done

clean:
	$(CARGO) clean
