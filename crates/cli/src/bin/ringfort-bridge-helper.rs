//! Opens a tap on a bridge for a user who may not. Meant to be installed set-user-ID root, or with CAP_NET_ADMIN as file capability.

#![forbid(unsafe_code)]

use ringfort_net::tap::helper;
use std::path::Path;
use std::process::ExitCode;

const HELP: &str = "\
Open a tap on a bridge and pass it on, for `ringfort run --net bridge=NAME` of users other than root.

Usage: ringfort-bridge-helper --br=NAME --fd=N [--use-vnet]

  --br=NAME    the bridge; /etc/ringfort/bridge.conf must allow it (lines: allow NAME|all, deny NAME|all, include FILE)
  --fd=N       an inherited unix socket that the tap is passed over
  --use-vnet   frames have headers of virtio (they always do)

Install it with: chown root ringfort-bridge-helper && chmod u+s ringfort-bridge-helper";

fn main() -> ExitCode {
    if let Err(e) = helper::drop_rights() {
        eprintln!("making taps: {e}; install this program set-user-ID root");
        return ExitCode::FAILURE;
    }
    let (mut bridge, mut fd) = (None, None);
    for a in std::env::args().skip(1) {
        match a.split_once('=') {
            Some(("--br", name)) => bridge = Some(name.to_owned()),
            Some(("--fd", n)) => fd = n.parse().ok().filter(|&n: &i32| n > 2),
            None if a == "--use-vnet" => {}
            None if a == "--help" => {
                println!("{HELP}");
                return ExitCode::SUCCESS;
            }
            _ => {
                eprintln!("'{a}' is not known; give --br=NAME --fd=N");
                return ExitCode::from(2);
            }
        }
    }
    let (Some(bridge), Some(fd)) = (bridge, fd) else {
        eprintln!("give --br=NAME and --fd=N (a number above 2)");
        return ExitCode::from(2);
    };
    match helper::serve(Path::new(helper::ACCESS_LIST), &bridge, fd) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("{e}");
            ExitCode::FAILURE
        }
    }
}
