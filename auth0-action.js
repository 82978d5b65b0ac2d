/**
 * Auth0 post-login Action: grants every scope that the client asked for and Auth0 advertises.
 *
 * Where: Auth0 Dashboard → Actions → Library → Create Action → Build from scratch, trigger
 * "Login / Post Login". Paste this whole file, Deploy, then drag it into Actions → Triggers →
 * post-login and Apply: a deployed Action that is not in the flow does not run.
 *
 * Why: ChatGPT asks for every scope in the tenant's `scopes_supported` and compares them with those
 * that it was granted. Auth0 leaves some out of a token for your own API, and ChatGPT then fails with
 * OAUTH_SCOPES_MISMATCH. `addScope` grants them regardless of Auth0's own policies.
 *
 * It runs at each login and refresh of every application of the tenant. The scopes give applications
 * more of a user's profile at Auth0's /userinfo, and nothing in this server. If other applications use
 * the tenant, uncomment the handler's first line and put your API Identifier there.
 */
const ADVERTISED_SCOPES = ("openid profile offline_access name given_name family_name nickname email email_verified " +
  "picture created_at identities phone address").split(" ");

exports.onExecutePostLogin = async (event, api) => {
  // if (event.resource_server?.identifier !== "https://your-domain.com/mcp") return;

  // No more than was asked: a client that asked for less would see a mismatch as well. At a refresh Auth0 need not say
  // what was asked. Then all are granted, as ChatGPT asks for all; another client gets more than it asked for.
  const requested = event.transaction?.requested_scopes ?? ADVERTISED_SCOPES;
  for (const scope of ADVERTISED_SCOPES) {
    if (requested.includes(scope)) api.accessToken.addScope(scope);
  }
};
