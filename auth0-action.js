/**
 * Auth0 post-login Action: grants the OpenID Connect scopes that the client asked for.
 *
 * Where: Auth0 Dashboard → Actions → Library → Create Action → Build from scratch, trigger
 * "Login / Post Login". Paste this whole file, Deploy, then drag it into Actions → Triggers →
 * post-login and Apply: a deployed Action that is not in the flow does not run.
 *
 * Why: ChatGPT asks for every scope in the tenant's `scopes_supported` and compares what it was
 * granted. Auth0 leaves some of them out of a token for your own API, and ChatGPT then fails with
 * OAUTH_SCOPES_MISMATCH. `addScope` adds them after Auth0's own policies have had their say.
 *
 * Exactly what was asked, no more: a client that asked for less would see a mismatch as well.
 * These scopes open nothing in this server: its tools look at permissions, never at OIDC scopes.
 */
const OIDC_SCOPES = ("openid profile offline_access name given_name family_name nickname email email_verified " +
  "picture created_at identities phone address").split(" ");

exports.onExecutePostLogin = async (event, api) => {
  // Auth0 need not say what was asked, as at a refresh: then all, which is what ChatGPT asked for.
  const requested = event.transaction?.requested_scopes ?? OIDC_SCOPES;
  for (const scope of OIDC_SCOPES) {
    if (requested.includes(scope)) api.accessToken.addScope(scope);
  }
};
