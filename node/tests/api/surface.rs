//! Nothing of the client surface is a silent 404: every route is here, or says what takes its place.

use http::Method;
use serde_json::Value;

use crate::world::{ADMIN_KEY, World};

/// The routes of the client surface; `{}` stands for a capsule's id, `{x}` for anything.
const SURFACE: &str = "
GET /health
GET /openapi.json
GET /openapi.yaml
GET /docs
POST /v1/capsules
GET /v1/capsules
GET /v1/capsules/{}
DELETE /v1/capsules/{}
POST /v1/capsules/{}/pause
POST /v1/capsules/{}/resume
POST /v1/capsules/{}/ping
GET /v1/capsules/stats
GET /v1/capsules/usage
GET /v1/capsules/{}/metrics
POST /v1/capsules/{}/exec
GET /v1/capsules/{}/exec/stream
GET /v1/capsules/{}/processes
DELETE /v1/capsules/{}/processes/1
GET /v1/capsules/{}/processes/1/stream
GET /v1/capsules/{}/pty
POST /v1/capsules/{}/files/read
POST /v1/capsules/{}/files/write
POST /v1/capsules/{}/files/list
POST /v1/capsules/{}/files/mkdir
POST /v1/capsules/{}/files/remove
POST /v1/capsules/{}/files/stream/read
POST /v1/capsules/{}/files/stream/write
POST /v1/snapshots
GET /v1/snapshots
DELETE /v1/snapshots/x
GET /v1/events/stream
POST /v1/auth/signup
POST /v1/auth/activate
POST /v1/auth/login
POST /v1/auth/switch-team
GET /auth/oauth/x
GET /auth/oauth/x/callback
GET /v1/me
PATCH /v1/me
DELETE /v1/me
POST /v1/me/password
POST /v1/me/password/reset
POST /v1/me/password/reset/confirm
GET /v1/me/providers/x/connect
DELETE /v1/me/providers/x
POST /v1/api-keys
GET /v1/api-keys
DELETE /v1/api-keys/x
GET /v1/teams
POST /v1/teams
GET /v1/teams/x
PATCH /v1/teams/x
DELETE /v1/teams/x
GET /v1/teams/x/members
POST /v1/teams/x/members
PATCH /v1/teams/x/members/x
DELETE /v1/teams/x/members/x
POST /v1/teams/x/leave
GET /v1/users/search?email=a
POST /v1/hosts
GET /v1/hosts
GET /v1/hosts/x
DELETE /v1/hosts/x
GET /v1/hosts/x/delete-preview
POST /v1/hosts/x/token
GET /v1/hosts/x/tags
POST /v1/hosts/x/tags
DELETE /v1/hosts/x/tags/x
POST /v1/hosts/register
POST /v1/hosts/auth/refresh
POST /v1/hosts/x/heartbeat
POST /v1/hosts/sandbox-events
POST /v1/channels
GET /v1/channels
POST /v1/channels/test
GET /v1/channels/x
PATCH /v1/channels/x
DELETE /v1/channels/x
PUT /v1/channels/x/config
GET /v1/audit-logs
GET /v1/admin/teams
PUT /v1/admin/teams/x/byoc
DELETE /v1/admin/teams/x
GET /v1/admin/users
PUT /v1/admin/users/x/active
GET /v1/admin/audit-logs
GET /v1/admin/templates
DELETE /v1/admin/templates/x
POST /v1/admin/builds
GET /v1/admin/builds
GET /v1/admin/builds/x
POST /v1/admin/builds/x/cancel
POST /v1/admin/capsules
GET /v1/admin/capsules
GET /v1/admin/capsules/x
DELETE /v1/admin/capsules/x
POST /v1/admin/capsules/x/snapshot
";

/// An id of the right shape that nobody has.
const NOBODY: &str = "cl-0000000000000000000000001";

#[tokio::test]
async fn every_route_of_the_client_surface_is_here_or_says_what_takes_its_place() {
    let world = World::new().await;
    let mut pointed = 0;
    for line in SURFACE.lines().filter(|line| !line.is_empty()) {
        let (method, path) = line.split_once(' ').unwrap();
        // It never ends; its own tests read it.
        if path.ends_with("/events/stream") {
            continue;
        }
        for prefix in ["", "/api"] {
            let is_page = !path.starts_with("/v1/");
            if is_page && !prefix.is_empty() {
                continue;
            }
            let method: Method = method.parse().unwrap();
            let path = format!("{prefix}{}", path.replace("{}", NOBODY));
            let answer = world.ask(method, &path, ADMIN_KEY, "").await;
            let shown = String::from_utf8_lossy(&answer.body).into_owned();
            assert!(!shown.contains("there is no route"), "{line}: {shown}");
            assert_ne!(answer.status, 405, "{line}: {shown}");
            assert!(
                answer.status < 500 || answer.status == 501,
                "{line}: {shown}"
            );
            if answer.status == 501 {
                let error: Value = answer.json();
                let message = error["error"]["message"].as_str().unwrap();
                assert!(
                    message.starts_with("this version does not have"),
                    "{line}: {message}"
                );
                pointed += 1;
            }
        }
    }
    println!("{pointed} answers pointed elsewhere");
}
